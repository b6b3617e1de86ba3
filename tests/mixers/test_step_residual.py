"""A block's norm, mixer and residual in joined kernels: the same numbers as one after the other, and as forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from plait.config.schema import MLPConfig
from plait.config.table import mixer_class
from plait.mixers.contract import Layout, Mixer, State
from plait.nn import joined
from plait.nn.mlp import MLP
from plait.nn.norm import RMSNorm
from plait.nn.roles import cast_parameters
from tests.invariants import TOLERANCE, VARIANTS, WIDTH, close, lay, make_mixer, redraw, sequences

PAST = (7, 1, 0)
STEPS = 3
DTYPES = [torch.float64, torch.float32]
JOINED = [name for name, (kind, _) in VARIANTS.items() if kind in ("mamba", "mamba2", "mamba3")] + [
    "attention",
    "attention window",
    "attention wide window",
    "attention multi-query",
]
MORE: dict[str, tuple[str, dict[str, object]]] = {
    "mamba2 norm first": ("mamba2", {"headdim": 8, "d_state": 6, "norm_before_gate": True, "ngroups": 2}),
    "mamba2 narrow norm": (
        "mamba2",
        {"headdim": 8, "d_state": 4, "d_ssm": 16, "bias": True, "conv_bias": False},
    ),
    "mamba2 no gate norm": ("mamba2", {"headdim": 8, "d_state": 4, "gate_norm": False, "d_conv": 1}),
    "rnn": ("rnn", {"d_hidden": WIDTH}),  # as wide as its input, as a residual wants
    "lstm": ("lstm", {"d_hidden": WIDTH}),
    "mamba one tap": ("mamba", {"d_state": 4, "d_conv": 1, "gate": "identity"}),
}
ALL = {**VARIANTS, **MORE}
every = pytest.mark.parametrize("name", ALL)
joining = pytest.mark.parametrize("name", [*JOINED, *(name for name in MORE if name.startswith("mamba"))])


def norm_of(kind: str) -> nn.Module:
    made: dict[str, Callable[[], nn.Module]] = {
        "rms": lambda: RMSNorm(WIDTH, eps=0.02),
        "bare": lambda: RMSNorm(WIDTH, weight=False),
        "none": nn.Identity,
        "layer": lambda: nn.LayerNorm(WIDTH),
    }
    norm = made[kind]()
    redraw(norm)
    return norm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A one for every joined map that ran."""
    seen: list[int] = []
    right = joined.norm_linear

    def counted(*args: object, **options: object) -> Tensor:
        seen.append(1)
        return right(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(joined, "norm_linear", counted)
    yield seen


def after_prefix(
    mixer: Mixer, norm: nn.Module, rows: int, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], State]:
    """Sequences of different lengths, and the state after all but the last STEPS tokens of each."""
    past = PAST[-rows:]
    xs = [x.to(dtype) for x in sequences(mixer, [n + STEPS for n in past])]
    state = mixer.init_state(rows, max(past) + STEPS, dtype=xs[0].dtype)
    before = torch.cat([x[:, :n] for x, n in zip(xs, past, strict=True)], 1)
    if before.shape[1]:
        mixer.step(norm(before), lay(Layout.from_lengths(past), before), state)
    return xs, state


def step_layout(rows: int, t: int, x: Tensor) -> Layout:
    start = torch.tensor(PAST[-rows:]) + t
    return lay(Layout.dense(rows, 1, start=start, max_past=int(start.max())), x)


def check_joined(mixer: Mixer, norm: nn.Module, tolerance: float, rows: int) -> None:
    """Token by token from three different pasts: as norm, step and sum, and as the whole text at once."""
    xs, state = after_prefix(mixer, norm, rows)
    apart, addresses = state.clone(), [t.data_ptr() for t in state.values()]
    wholes = [x + mixer(norm(x), lay(Layout.dense(1, x.shape[1]), x))[0] for x in xs]
    for t in range(STEPS):
        x = torch.cat([x[:, n + t : n + t + 1] for x, n in zip(xs, PAST[-rows:], strict=True)])
        kept = x.clone()
        layout = step_layout(rows, t, x)
        got = mixer.step_residual(x, norm, layout, state)
        close(got, x + mixer.step(norm(x), layout, apart), tolerance, "joined and apart")
        want = torch.cat([w[:, n + t : n + t + 1] for w, n in zip(wholes, PAST[-rows:], strict=True)])
        close(got, want, tolerance, "joined and at once")
        for name in state:
            close(state[name], apart[name], tolerance, f"state {name}")
        assert torch.equal(x, kept), "x was changed"
    assert addresses == [t.data_ptr() for t in state.values()], "the state moved"


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_joined_is_apart_is_at_once(name: str, dtype: torch.dtype) -> None:
    kind, options = ALL[name]
    for norm, rows in (("rms", 3), ("rms", 1)) if dtype == torch.float32 else (("bare", 3), ("layer", 1)):
        check_joined(make_mixer(kind, options, dtype=dtype), norm_of(norm).to(dtype), TOLERANCE[dtype], rows)


@joining
def test_it_is_joined(name: str, calls: list[int]) -> None:
    """For what it is meant for the joined kernels run, and neither the norm nor the projections on their own."""
    kind, options = ALL[name]
    for norm in ("rms", "bare", "none"):
        check_joined(make_mixer(kind, options), norm_of(norm), 1e-12, 3)
        count = 3 if kind == "mamba" and options.get("projections") != "separate" else 2
        assert len(calls) == count * STEPS
        calls.clear()


@pytest.mark.parametrize("name", [name for name, (kind, _) in ALL.items() if kind in ("mamba", "mamba2")])
def test_convolved_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the projection's kernel convolves its columns."""
    seen: list[int] = []
    right = joined.convolved_linear

    def counted(*args: object, **options: object) -> Tensor:
        seen.append(1)
        return right(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(joined, "convolved_linear", counted)
    kind, options = ALL[name]
    monkeypatch.setattr(f"plait.mixers.{kind}.convolves", lambda x: True)
    for norm in ("rms", "none"):
        check_joined(make_mixer(kind, options), norm_of(norm), 1e-12, 3)
    assert len(seen) == 2 * STEPS


@joining
def test_bfloat16_is_as_near_to_the_truth(name: str) -> None:
    """Joined kernels round less often than separate ones; errors against float64, over all steps and both states."""
    kind, options = ALL[name]
    mixer, norm = make_mixer(kind, options, dtype=torch.float32), norm_of("rms").float()
    narrow = cast_parameters(deepcopy(mixer), torch.bfloat16)
    wide, wide_norm = deepcopy(narrow).double(), deepcopy(norm).double()
    xs, state = after_prefix(narrow, norm, 3, torch.bfloat16)
    apart, true = state.clone(), state.to(torch.float64)
    errors: list[list[Tensor]] = [[], [], []]
    for t in range(STEPS):
        x = torch.cat([x[:, n + t : n + t + 1] for x, n in zip(xs, PAST, strict=True)])
        layout = step_layout(3, t, x)
        errors[0].append(narrow.step_residual(x, norm, layout, state))
        errors[1].append(x + narrow.step(norm(x), layout, apart))
        errors[2].append(x.double() + wide.step(wide_norm(x.double()), layout, true))
    got, usual, want = (torch.cat(parts).double() for parts in errors)
    error, limit = ((y - want).square().mean().sqrt() / want.square().mean().sqrt() for y in (got, usual))
    assert error <= 1.25 * limit + 1e-3 and limit < 2e-2, (float(error), float(limit))


@joining
def test_what_is_not_plain_goes_its_own_way(name: str, calls: list[int]) -> None:
    """Hooks are called, autocast casts, adapters and other kinds of maps compute what they do."""
    kind, options = ALL[name]
    mixer, norm = make_mixer(kind, options, dtype=torch.float32), norm_of("rms").float()
    xs, state = after_prefix(mixer, norm, 3)
    x = torch.cat([x[:, n : n + 1] for x, n in zip(xs, PAST, strict=True)])
    layout = step_layout(3, 0, x)

    def same(given: Mixer, norm: nn.Module, x: Tensor = x, layout: Layout = layout) -> Tensor:
        own, apart = state.clone(), state.clone()
        got = given.step_residual(x, norm, layout, own)
        assert torch.equal(got, x + given.step(norm(x), layout, apart))
        assert all(torch.equal(own[k], apart[k]) for k in own)
        return got

    plain = mixer.step_residual(x, norm, layout, state.clone())
    assert calls
    calls.clear()
    same(mixer, norm_of("layer").float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(mixer, norm)
    for part in ("in_proj", "out_proj"):
        hooked = deepcopy(mixer)
        hooked.get_submodule(part).register_forward_hook(lambda module, args, y: 2 * y)
        assert not torch.allclose(same(hooked, norm), plain)

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        other = deepcopy(mixer)
        other.get_submodule(part).__class__ = Doubled
        assert not torch.allclose(same(other, norm), plain)
    two = torch.cat([x, x], 1)
    start = torch.tensor(PAST)
    same(mixer, norm, two, lay(Layout.dense(3, 2, start=start, max_past=7), two))
    packed = x.transpose(0, 1)
    same(mixer, norm, packed, lay(Layout.from_lengths([1, 1, 1], start=start, max_past=7), packed))
    ternary = _ternary(kind, options)
    assert not torch.allclose(same(ternary, norm), plain)
    assert not calls


def _ternary(kind: str, options: dict[str, object]) -> Mixer:
    cls = mixer_class(kind)
    mixer = cls(cls.options_class(**options), WIDTH, layer_index=0, linear="ternary")
    redraw(mixer)
    return mixer.eval()


def test_a_state_that_lies_apart_is_written_all_the_same() -> None:
    mixer, norm = make_mixer(*VARIANTS["mamba2"]), norm_of("rms")
    xs, state = after_prefix(mixer, norm, 3)
    x = torch.cat([x[:, n : n + 1] for x, n in zip(xs, PAST, strict=True)])
    layout = step_layout(3, 0, x)
    apart = State({k: torch.stack([t, t], -1)[..., 0] for k, t in state.items()})
    want = mixer.step_residual(x, norm, layout, state)
    close(mixer.step_residual(x, norm, layout, apart), want, 1e-12, "y")
    for name in state:
        close(apart[name], state[name], 1e-12, name)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu2", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp(kind: str, bias: bool, calls: list[int]) -> None:
    mlp = MLP(MLPConfig(kind=kind, width=24, bias=bias), WIDTH).double().eval()
    redraw(mlp)
    x = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for name in ("rms", "bare", "none"):
        norm = norm_of(name).double()
        close(mlp.step_residual(x, norm), x + mlp(norm(x)), 1e-12, name)
        assert len(calls) == 2
        calls.clear()
    layer = norm_of("layer").double()
    assert torch.equal(mlp.step_residual(x, layer), x + mlp(layer(x)))
    two = torch.cat([x, x], 1)
    assert torch.equal(mlp.step_residual(two, norm), two + mlp(norm(two)))
    assert not calls
