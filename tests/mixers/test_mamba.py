"""Mamba-1: its defaults and initial weights, and one step written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from plait.config.errors import ConfigError
from plait.config.schema import ModelConfig
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba, Options
from plait.models.model import Model
from plait.nn.roles import MATRIX, VECTOR_FP32, parameter_roles
from tests.invariants import close, make_mixer, sequences


def test_shapes_are_those_of_the_checkpoints() -> None:
    shapes = {name: tuple(p.shape) for name, p in Mamba(Options(), 40).named_parameters()}
    assert shapes == {
        "A_log": (80, 16),
        "D": (80,),
        "in_proj.weight": (160, 40),
        "conv1d.weight": (80, 1, 4),
        "conv1d.bias": (80,),
        "x_proj.weight": (3 + 32, 80),  # the rank of the time step is 40 / 16, rounded up
        "dt_proj.weight": (80, 3),
        "dt_proj.bias": (80,),
        "out_proj.weight": (40, 80),
    }


def test_a_rank_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="dt_rank"):
        Options(dt_rank=0)


def test_initial_weights_survive_the_model() -> None:
    """transformers #43717, #45591: initialising every linear map alike loses the time steps."""
    options = {"d_state": 5, "dt_min": 0.01, "dt_max": 0.02, "dt_rank": 4}
    torch.manual_seed(0)
    model = Model(ModelConfig(d_model=64, n_layer=2, pattern="M", vocab_size=20, mamba=options))
    for block in model.blocks:
        mixer = block.mixer
        dt = F.softplus(mixer.dt_proj.bias)
        assert 0.01 <= dt.min() < 0.0115 and 0.0175 < dt.max() <= 0.02001
        assert mixer.dt_proj.weight.abs().max() <= 0.5 and mixer.dt_proj.weight.std() > 0.25
        assert torch.equal(mixer.A_log, torch.arange(1.0, 6.0).log().expand(128, 5))
        assert torch.equal(mixer.D, torch.ones(128))


def test_constant_weights_of_the_time_step() -> None:
    mixer = Mamba(Options(dt_init="constant", dt_scale=2.0, dt_rank=4), 16)
    assert torch.equal(mixer.dt_proj.weight, torch.ones(32, 4))


def test_roles() -> None:
    roles = parameter_roles(Mamba(Options(), 16))
    assert roles["dt_proj.weight"] == roles["x_proj.weight"] == MATRIX
    assert roles["dt_proj.bias"] == roles["A_log"] == roles["D"] == VECTOR_FP32


def test_one_token_by_hand() -> None:
    """From a state: the bias of the time step is added once, x comes before z, and dt before B before C."""
    mixer = make_mixer("mamba", {"d_state": 3, "dt_rank": 2})
    (u,) = sequences(mixer, [1])
    g = torch.Generator().manual_seed(2)
    state = mixer.init_state(1, dtype=torch.float64)
    for tensor in state.values():
        tensor.normal_(generator=g)
    y, new = mixer(u, Layout.dense(1, 1), state)
    xz = mixer.in_proj.weight @ u[0, 0]
    x, z = xz[:32], xz[32:]
    taps = torch.cat([state["conv"][0], x[None]])
    x = F.silu((taps * mixer.conv1d.weight[:, 0].T).sum(0) + mixer.conv1d.bias)
    rows = mixer.x_proj.weight @ x
    dt = F.softplus(mixer.dt_proj.weight @ rows[:2] + mixer.dt_proj.bias)
    decay = torch.exp(-dt[:, None] * mixer.A_log.exp())
    h = decay * state["ssm"][0] + (dt * x)[:, None] * rows[2:5]
    out = mixer.out_proj.weight @ ((h @ rows[5:] + mixer.D * x) * F.silu(z))
    close(y[0, 0], out, 1e-12, "y")
    assert new is not None
    close(new["ssm"][0], h, 1e-12, "state")
    assert torch.equal(new["conv"][0], taps[1:])


def test_separate_projections_have_weights_of_their_own() -> None:
    options = {"d_state": 5, "projections": "separate"}
    shapes = {n: tuple(p.shape) for n, p in Mamba(Options(dt_rank="full", **options), 10).named_parameters()}
    assert shapes == {
        "A_log": (20, 5),
        "D": (20,),
        "dt_bias": (20,),
        "in_proj.weight": (40, 10),
        "conv1d.weight": (20, 1, 4),
        "conv1d.bias": (20,),
        "dt_proj.weight": (20, 20),
        "B_proj.weight": (5, 20),
        "C_proj.weight": (5, 20),
        "out_proj.weight": (10, 20),
    }
    low = dict(Mamba(Options(dt_rank=3, **options), 10).named_parameters())
    assert (low["dt_down.weight"].shape, low["dt_proj.weight"].shape) == ((3, 20), (20, 3))
    roles = parameter_roles(Mamba(Options(dt_rank=3, **options), 10))
    assert roles["dt_bias"] == VECTOR_FP32
    assert {roles[f"{name}.weight"] for name in ("dt_down", "dt_proj", "B_proj", "C_proj")} == {MATRIX}


@pytest.mark.parametrize("rank", [3, "full"])
def test_separate_projections_are_the_joined_ones_apart(rank: int | str) -> None:
    """The same weights, laid out otherwise, give the same numbers."""
    joined = make_mixer("mamba", {"d_state": 4, "dt_rank": rank})
    apart = make_mixer("mamba", {"d_state": 4, "dt_rank": rank, "projections": "separate"})
    weights = dict(joined.named_parameters())
    rows = list(weights["x_proj.weight"].split([0 if rank == "full" else rank, 4, 4]))
    moved = {
        "dt_down.weight": rows[0],
        "B_proj.weight": rows[1],
        "C_proj.weight": rows[2],
        "dt_bias": weights["dt_proj.bias"],
    }
    with torch.no_grad():
        for name, p in apart.named_parameters():
            p.copy_(moved[name] if name in moved else weights[name])
    (x,) = sequences(joined, [30])
    close(apart(x, Layout.dense(1, 30))[0], joined(x, Layout.dense(1, 30))[0], 1e-12, "y")


def test_the_factor_of_the_bias_is_that_of_the_bias() -> None:
    for more in ({}, {"projections": "separate"}):
        twice = make_mixer("mamba", {"dt_bias_scale": 2, **more})
        once = make_mixer("mamba", more)
        bias = once.dt_bias if more else once.dt_proj.bias
        (x,) = sequences(once, [20])
        apart = once(x, Layout.dense(1, 20))[0]
        with torch.no_grad():
            bias.mul_(2)
        y = twice(x, Layout.dense(1, 20))[0]
        close(y, once(x, Layout.dense(1, 20))[0], 1e-12, "y")
        assert (y - apart).abs().max() > 1e-3


@pytest.mark.parametrize("more", [{}, {"projections": "separate"}])
def test_initial_time_steps_do_not_depend_on_the_factor(more: dict[str, str]) -> None:
    mixer = Mamba(Options(dt_min=0.01, dt_max=0.02, dt_bias_scale=2, **more), 64)
    dt = F.softplus(2 * (mixer.dt_bias if more else mixer.dt_proj.bias))
    assert 0.01 <= dt.min() < 0.0115 and 0.0175 < dt.max() <= 0.02001


def test_the_gate_with_and_without_its_activation() -> None:
    """With z of one, a gate of identity changes nothing and one of SiLU multiplies by silu(1)."""
    outputs = []
    for gate in ("identity", "silu"):
        mixer = make_mixer("mamba", {"gate": gate, "bias": True})
        with torch.no_grad():
            mixer.in_proj.weight[32:] = 0
            mixer.in_proj.bias[32:] = 1
            mixer.out_proj.bias.zero_()
        (x,) = sequences(mixer, [20])
        outputs.append(mixer(x, Layout.dense(1, 20))[0])
    identity, silu = outputs
    close(silu, identity * F.silu(torch.ones((), dtype=torch.float64)), 1e-12, "y")


def test_options_that_separate_projections_cannot_honour() -> None:
    for given in ({"dt_init": "constant"}, {"dt_scale": 2.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(given))} is of joined projections"):
            Options(projections="separate", **given)
