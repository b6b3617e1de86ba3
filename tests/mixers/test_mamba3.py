"""Mamba-3: regression tests for known defects (the issue numbers are those of state-spaces/mamba)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from plait.config.errors import BuildError, ConfigError
from plait.config.schema import ModelConfig
from plait.mixers.contract import Layout, Mixer, State
from plait.mixers.mamba3 import Mamba3, Options
from plait.models.model import Model
from plait.nn.roles import cast_parameters
from tests.invariants import (
    check_edges,
    check_packed_states,
    check_steps,
    close,
    make_mixer,
    redraw,
    sequences,
)

TWO_PI = 2 * math.pi
SISO = {"headdim": 8, "d_state": 6}
MIMO = {"headdim": 8, "d_state": 6, "is_mimo": True, "mimo_rank": 2}
both = pytest.mark.parametrize("options", [SISO, MIMO], ids=["SISO", "MIMO"])


def test_shapes_are_those_of_the_checkpoints() -> None:
    options = Options(d_state=12, headdim=8, ngroups=2, is_mimo=True, rope_fraction=0.9, out_norm=True)
    shapes = {name: tuple(p.shape) for name, p in Mamba3(options, 16).named_parameters()}
    assert shapes == {
        "dt_bias": (4,),
        "B_bias": (4, 4, 12),
        "C_bias": (4, 4, 12),
        "D": (4,),
        "mimo_x": (4, 4, 8),
        "mimo_z": (4, 4, 8),
        "mimo_o": (4, 4, 8),
        "in_proj.weight": (
            2 * 32 + 2 * 12 * 2 * 4 + 3 * 4 + 5,
            16,
        ),  # 0.9 of 12, rounded down to even: 5 pairs
        "B_norm.weight": (12,),
        "C_norm.weight": (12,),
        "norm.weight": (32,),
        "out_proj.weight": (16, 32),
    }


def test_initial_weights() -> None:
    mixer = Mamba3(Options(d_state=8, headdim=8, is_mimo=True, mimo_rank=2), 16)
    for name, value in {"B_bias": 1, "C_bias": 1, "D": 1, "mimo_x": 0.5, "mimo_z": 1, "mimo_o": 0.5}.items():
        assert (mixer.get_parameter(name) == value).all(), name
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1001


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="set is_mimo"):
        Options(mimo_rank=2)
    with pytest.raises(ConfigError, match="d_state"):
        Options(d_state=5)
    with pytest.raises(ConfigError, match=r"a_activation.*heavy_tail"):
        Options(a_activation="relu")
    with pytest.raises(BuildError, match="less than one pair"):
        Mamba3(Options(d_state=2, headdim=8), 16)
    with pytest.raises(BuildError, match=r"layer 3 \(mamba3\): ngroups 3 does not divide the 4 heads"):
        Mamba3(Options(headdim=8, ngroups=3), 16, layer_index=3)
    with pytest.raises(BuildError, match="not a multiple of headdim 7"):
        Mamba3(Options(headdim=7), 16)


def test_a_config_carries_the_activation() -> None:
    """Two releases of the original read the same weights in two ways, without a field that says so."""
    config = ModelConfig(d_model=16, pattern="M3", vocab_size=9, mamba3=SISO | {"a_activation": "softplus"})
    (layer,) = config.layers()
    assert layer.options.model_dump()["a_activation"] == "softplus"
    assert Options().model_dump()["a_activation"] == "heavy_tail"


@both
@pytest.mark.parametrize("pattern", ["M3", "M3 T", "M M3 M2 T lstm s4d M3"])
@torch.no_grad()
def test_a_model_decodes_token_by_token(pattern: str, options: dict[str, object]) -> None:
    """#1014, #1022: every language model with Mamba-3 failed at the first generated token."""
    sections = {"mamba2": {"headdim": 8, "d_state": 6}, "mamba3": options, "mamba": {"d_state": 4}}
    config = ModelConfig(d_model=16, pattern=pattern, vocab_size=30, mlp="none", **sections)
    model = Model(config, dtype=torch.float64).eval()
    redraw(model)
    ids = torch.randint(0, 30, (2, 20), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, 20)
    pieces = [model.step(ids[:, :8], cache), *(model.step(ids[:, t : t + 1], cache) for t in range(8, 20))]
    close(torch.cat(pieces, 1), model(ids).logits, 1e-11, "logits")


@pytest.mark.parametrize("headdim", [1, 5, 16, 32])
def test_any_width_of_a_head(headdim: int) -> None:
    """#1024: the step kernel assumed heads of 64 and wrote beyond others, into the weights."""
    mixer = make_mixer("mamba3", {"headdim": headdim, "d_state": 6, "expand": 10})
    before = [p.detach().clone() for p in mixer.parameters()]
    check_steps(mixer, 1e-12, length=12)
    assert all(torch.equal(a, b) for a, b in zip(before, mixer.parameters(), strict=True))


@both
def test_states_of_packed_documents_are_their_own(options: dict[str, object]) -> None:
    """The end state of each document held the last token of the whole pack as its v."""
    mixer = make_mixer("mamba3", options)
    lengths = (5, 1, 0, 9)
    xs = sequences(mixer, lengths)
    given = State({n: torch.randn_like(t) for n, t in mixer.init_state(4, dtype=torch.float64).items()})
    given["angle"] = given["angle"].remainder(TWO_PI)
    _, joint = mixer(torch.cat(xs, 1), Layout.from_lengths(lengths), given)
    assert joint is not None
    for row, x in enumerate(xs):
        _, own = mixer(x, Layout.dense(1, x.shape[1]), given.select([row]))
        assert own is not None
        for name in given:
            close(joint[name][row : row + 1], own[name], 1e-12, f"{name} of document {row}")
    check_packed_states(mixer, 1e-12)


@pytest.mark.parametrize("ngroups", [2, 4])
def test_groups_between_one_and_all_heads(ngroups: int) -> None:
    """The step needed one group, or one for each head."""
    mixer = make_mixer("mamba3", {"headdim": 4, "d_state": 6, "ngroups": ngroups})
    assert mixer.n_head == 8
    check_steps(mixer, 1e-12, length=20)


@both
def test_no_token_and_one_token(options: dict[str, object]) -> None:
    """#985: MIMO failed for sequences of one token."""
    check_edges(make_mixer("mamba3", options))


def spinning(dtype: torch.dtype) -> Mixer:
    """A tiny layer whose angles turn by about pi a token and always forward."""
    mixer = make_mixer("mamba3", {"headdim": 4, "d_state": 4, "expand": 0.25}, dtype=torch.float64)
    with torch.no_grad():
        mixer.in_proj.weight[-1] = 0
        mixer.in_proj.weight[-1, 0] = 5.0
        mixer.in_proj.weight[-4] = 0  # dd_dt: every time step is near 1
        mixer.dt_bias.fill_(0.54)
    return mixer.to(dtype)


def forward_input(length: int) -> Tensor:
    x = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 0] = 1.0 + 0.1 * x[..., 0]
    return x


def turned(a: Tensor, b: Tensor) -> float:
    """The largest distance of two angles on the circle."""
    d = (a.double() - b.double()).remainder(TWO_PI)
    return float(torch.minimum(d, TWO_PI - d).max())


@torch.no_grad()
def test_the_angle_stays_in_one_turn_while_decoding() -> None:
    """The step never reduced the angle, so its float32 lost digits as it grew."""
    length = 400
    mixer, exact = spinning(torch.float32), spinning(torch.float64)
    x = forward_input(length)
    state = mixer.init_state(1)
    for t in range(length):
        layout = Layout.dense(1, 1, start=torch.tensor([t]), max_past=t)
        mixer.step(x[:, t : t + 1].float(), layout, state)
        assert state["angle"].min() >= 0 and state["angle"].max() < TWO_PI
    _, prefill = mixer(x.float(), Layout.dense(1, length), mixer.init_state(1))
    _, truth = exact(x, Layout.dense(1, length), exact.init_state(1, dtype=torch.float64))
    assert prefill is not None and truth is not None
    assert turned(state["angle"], truth["angle"]) < 1e-3
    assert turned(prefill["angle"], truth["angle"]) < 1e-3


@torch.no_grad()
def test_the_angle_after_a_hundred_thousand_tokens() -> None:
    """The same over pieces of a long text: the angle has turned 50,000 times."""
    mixer, exact = spinning(torch.float32), spinning(torch.float64)
    x = forward_input(100_000)
    state = mixer.init_state(1)
    for start in range(0, x.shape[1], 10_000):
        piece = x[:, start : start + 10_000]
        mixer.step(piece.float(), Layout.dense(1, 10_000, start=torch.tensor([start]), max_past=start), state)
        assert state["angle"].min() >= 0 and state["angle"].max() < TWO_PI
    dt = torch.nn.functional.softplus(exact.dt_bias)
    turn = math.pi * torch.tanh(x @ exact.in_proj.weight[-1:].T) * dt
    assert turn.sum() > 100_000 * 3
    assert turned(state["angle"][0], turn.sum(1)) < 1e-2


@torch.no_grad()
def test_angles_are_float32_in_a_bfloat16_model() -> None:
    """#868, #876, #1017: angles were kept in bfloat16, whose spacing near 2 pi is 1/32."""
    mixer = cast_parameters(make_mixer("mamba3", SISO, dtype=torch.float32), torch.bfloat16)
    x = sequences(mixer, [30])[0].bfloat16()
    _, state = mixer(x, Layout.dense(1, 30), mixer.init_state(1, dtype=torch.bfloat16))
    assert state is not None and all(t.dtype == torch.float32 for t in state.values())
    parts = mixer.in_proj(x).double().split(mixer.widths, -1)
    dt = torch.nn.functional.softplus(parts[4] + mixer.dt_bias.double())
    turn = math.pi * torch.tanh(parts[7]).unsqueeze(-2) * dt.unsqueeze(-1)
    assert turned(state["angle"], turn.sum(1)) < 1e-4


@pytest.mark.parametrize("options", [SISO, MIMO | {"rope_fraction": 1.0}], ids=["SISO", "MIMO"])
@torch.no_grad()
def test_pairs_that_rotate_are_an_option(options: dict[str, object]) -> None:
    """The two forms rotate different pairs; permuting the state turns one into the other."""
    ours = {"SISO": "interleaved", "MIMO": "halves"}["MIMO" if options is not SISO else "SISO"]
    other = {"interleaved": "halves", "halves": "interleaved"}[ours]
    default, same = make_mixer("mamba3", options), make_mixer("mamba3", options | {"rope_pairs": ours})
    (x,) = sequences(default, [20])
    layout = Layout.dense(1, 20)
    y = default(x, layout)[0]
    assert torch.equal(y, same(x, layout)[0])
    moved = make_mixer("mamba3", options | {"rope_pairs": other})
    with pytest.raises(AssertionError):
        close(moved(x, layout)[0], y, 1e-3, "the other pairs")
    # half-split channel c is interleaved channel 2c, or 2(c - N/2) + 1
    N = default.d_state
    order = torch.arange(N).view(2, N // 2).T.flatten()  # interleaved place -> half-split place
    order = order if ours == "halves" else torch.argsort(order)
    moved.B_bias.copy_(moved.B_bias[..., order])
    moved.C_bias.copy_(moved.C_bias[..., order])
    moved.B_norm.weight.copy_(moved.B_norm.weight[order])
    moved.C_norm.weight.copy_(moved.C_norm.weight[order])
    first = 2 * default.d_inner
    rows = moved.in_proj.weight[first : first + 2 * default.rank * N].view(-1, N, 16)
    rows.copy_(rows[:, order].clone())
    close(moved(x, layout)[0], y, 1e-12, "permuted")


def test_decay_activations() -> None:
    x = torch.tensor([-1e4, -3.0, -1.0, 0.0, 0.5, 1.0, 100.0], dtype=torch.float64, requires_grad=True)
    heavy = Mamba3(Options(headdim=8), 16)._decay_rate(x)
    want = torch.tensor([1e-4, 0.25, 0.5, 1.0, 1.5, 2.0, 101.0], dtype=torch.float64)
    close(heavy, want, 1e-3, "heavy tail")
    assert heavy[0] == 1e-4  # the floor
    (slope,) = torch.autograd.grad(heavy.sum(), [x])
    close(slope, torch.tensor([0, 1 / 16, 1 / 4, 1, 1, 1, 1], dtype=torch.float64), 1e-12, "slope")
    soft = Mamba3(Options(headdim=8, a_activation="softplus", A_floor=0), 16)._decay_rate(x)
    close(soft, torch.nn.functional.softplus(x), 1e-12, "softplus")
