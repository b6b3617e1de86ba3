"""Defects of BitByte that must not come back here, one test for each, numbered as in the survey of its defects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.config.schema import LinearConfig, ModelConfig
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba, Options
from plait.models.model import Model
from plait.nn.embedding import Embedding
from plait.nn.linear import make_linear
from plait.nn.roles import cast_parameters
from plait.nn.ternary import TernaryLinear
from plait.ops.ternary import ternary_weight
from tests.invariants import make_mixer, redraw, sequences


def test_d1_every_channel_has_its_own_time_step_state_and_output() -> None:
    """There one state was shared by all channels, time steps had the state's size and y was one number a token."""
    mixer = make_mixer("mamba", {"d_state": 5, "projections": "separate", "dt_rank": "full"})
    (u,) = sequences(mixer, [12])
    state = mixer.init_state(1, dtype=torch.float64)
    assert {name: tuple(t.shape) for name, t in state.items()} == {"conv": (1, 3, 32), "ssm": (1, 32, 5)}
    with torch.no_grad():
        mixer.out_proj = nn.Identity()  # the channels before they are mixed
    before, first = mixer(u, Layout.dense(1, 12), state)
    with torch.no_grad():
        mixer.dt_bias[7] += 1
    after, second = mixer(u, Layout.dense(1, 12), state)
    assert before.shape == (1, 12, 32)
    moved = (before != after).any(1)[0]
    assert moved.nonzero().flatten().tolist() == [7]
    assert (first["ssm"] != second["ssm"]).any(-1)[0].nonzero().flatten().tolist() == [7]


def test_d1_decays_are_below_one_and_rates_are_spread() -> None:
    """There A was positive in one kernel, which explodes, and above -0.35 in the other, which forgets at once."""
    mixer = Mamba(Options(d_state=16), 8)
    assert torch.equal(mixer.A_log.exp().round(), torch.arange(1.0, 17.0).expand(16, 16))
    long = Layout.dense(1, 4000)
    y, state = mixer(torch.randn(1, 4000, 8), long, mixer.init_state(1))
    assert y.isfinite().all() and y.abs().max() < 100 and state["ssm"].abs().max() < 100


def test_d1_the_convolution_comes_before_the_gate_and_a_softplus_makes_time_steps_positive() -> None:
    mixer = make_mixer("mamba", {"d_state": 3, "projections": "separate", "dt_rank": "full"})
    (u,) = sequences(mixer, [6])
    x, z = F.linear(u, mixer.in_proj.weight).chunk(2, -1)
    taps = F.pad(x, (0, 0, 3, 0)).unfold(1, 4, 1)
    x = F.silu((taps * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
    dt = F.softplus(F.linear(x, mixer.dt_proj.weight) + mixer.dt_bias)
    B, C = F.linear(x, mixer.B_proj.weight), F.linear(x, mixer.C_proj.weight)
    assert (dt > 0).all() and ((dt - mixer.dt_bias) < 0).any()
    h, outputs = torch.zeros(32, 3, dtype=torch.float64), []
    for t in range(6):
        h = torch.exp(-dt[0, t, :, None] * mixer.A_log.exp()) * h + (dt * x)[0, t, :, None] * B[0, t]
        outputs.append((h @ C[0, t] + mixer.D * x[0, t]) * F.silu(z[0, t]))
    want = F.linear(torch.stack(outputs)[None], mixer.out_proj.weight)
    torch.testing.assert_close(mixer(u, Layout.dense(1, 6))[0], want)


def test_d2_rounded_activations_pass_their_gradient() -> None:
    """There it reached one element of each token, the largest."""
    layer = make_linear(32, 16, kind="ternary")
    x = torch.randn(5, 32, requires_grad=True)
    weights = torch.randn(5, 16)
    (layer(x) * weights).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weights @ ternary_weight(layer.weight, (16,)))
    assert (x.grad != 0).double().mean() > 0.99


def test_d2_layers_far_from_the_loss_learn_with_rounded_activations() -> None:
    torch.manual_seed(0)
    config = {"d_model": 32, "pattern": "M T M T", "vocab_size": 20, "linear": "ternary"}
    grads: dict[str, Tensor] = {}
    for activations in ("int8", "none"):
        torch.manual_seed(1)
        linear = {"kind": "ternary", "activations": activations}
        model = Model(ModelConfig.model_validate(config | {"linear": linear}))
        redraw(model)
        ids = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(0))
        model(ids, labels=ids).loss.backward()
        gradient = model.blocks[0].mixer.in_proj.weight.grad
        assert gradient is not None
        grads[activations] = gradient.flatten()
    assert F.cosine_similarity(grads["int8"], grads["none"], dim=0) > 0.95
    assert 0.8 < grads["int8"].norm() / grads["none"].norm() < 1.25


@pytest.mark.parametrize("draw", ["normal_", "uniform_"])
def test_d3_weights_above_the_scale_are_trained(draw: str) -> None:
    """There the gradient of 42 % of Gaussian and of half of all uniform weights was zeroed; that is an option now."""
    weight = getattr(torch.empty(200, 100), draw)(*((-1, 1) if draw == "uniform_" else ()))
    share = {}
    for ste in ("identity", "clipped"):
        config = LinearConfig.model_validate({"kind": "ternary", "ste": ste})
        layer = make_linear(100, 200, kind=config)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer(torch.rand(3, 100) + 0.5).sum().backward()
        assert layer.weight.grad is not None
        share[ste] = float((layer.weight.grad == 0).double().mean())
    assert LinearConfig(kind="ternary").ste == "identity" and share["identity"] == 0
    beyond = 0.5 if draw == "uniform_" else 1 - math.erf((2 / math.pi) ** 0.5 / 2**0.5)
    assert share["clipped"] == pytest.approx(beyond, abs=0.02)


@pytest.mark.parametrize(
    ("pattern", "mlp"), [("M", "none"), ("M2", "none"), ("M3", "none"), ("T", "none"), ("T", "swiglu")]
)
def test_d4_matrices_that_are_joined_have_scales_of_their_own(pattern: str, mlp: str) -> None:
    """There one scale for x and z, or for both halves of the gated MLP, let the larger silence the smaller."""
    config: dict[str, Any] = {"d_model": 32, "pattern": pattern, "vocab_size": 9, "mlp": mlp}
    config |= {"mamba2": {"headdim": 16, "d_state": 8}, "mamba3": {"headdim": 16, "d_state": 8}}
    zeros = {}
    for scale in ("part", "matrix"):
        linear = {"kind": "ternary", "scale": scale}
        block = Model(ModelConfig.model_validate(config | {"linear": linear})).blocks[0]
        layer = block.mixer.in_proj if block.mlp is None else block.mlp.fc1
        assert isinstance(layer, TernaryLinear)
        half = layer.out_features // 2
        with torch.no_grad():
            nn.init.normal_(layer.weight)
            layer.weight[half:] *= 100
        levels = ternary_weight(layer.weight, layer.parts)
        zeros[scale] = float((levels[: half // 2] == 0).double().mean())
    assert zeros["part"] < 0.5 < 0.95 < zeros["matrix"]


def ternary_hybrid() -> Model:
    config = {
        "d_model": 32,
        "pattern": "M T",
        "vocab_size": 40,
        "linear": {"kind": "ternary", "norm": True},
        "head": {"tie": False},
    }
    return Model(ModelConfig.model_validate(config))


def test_d5_what_is_fragile_stays_full() -> None:
    """There the path to the time steps was ternary as well."""
    model = ternary_hybrid()
    ternary = {name for name, m in model.named_modules() if isinstance(m, TernaryLinear)}
    assert ternary == {
        *(f"blocks.0.mixer.{name}" for name in ("in_proj", "x_proj", "out_proj")),
        *(f"blocks.1.mixer.{name}" for name in ("in_proj", "out_proj")),
        *(f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)),
    }
    mixer = model.blocks[0].mixer
    assert isinstance(model.embedding, Embedding) and isinstance(mixer.conv1d, nn.Conv1d)
    dt = torch.randn(4, mixer.dt_rank)
    torch.testing.assert_close(mixer.dt_proj(dt), dt @ mixer.dt_proj.weight.T)
    hidden = torch.randn(4, 32)
    torch.testing.assert_close(model.head(hidden), hidden @ model.head.unembedding.weight.T)
    cast_parameters(model, torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {
        "blocks.0.mixer.dt_proj.bias",
        "blocks.0.mixer.A_log",
        "blocks.0.mixer.D",
        "final_norm.weight",
    } <= kept


def test_d5_a_norm_inside_makes_the_scale_of_the_input_irrelevant() -> None:
    """As in BitNet: what reaches the rounding has a size of one."""
    layers = [m for m in ternary_hybrid().modules() if isinstance(m, TernaryLinear)]
    for layer in layers:
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(1000 * x), layer(x), atol=2e-2, rtol=0)
        assert (layer(1000 * x) - layer(x)).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize("preset", ["bitbyte", "bitbyte-mamba"])
def test_d6_the_presets_have_a_cache_any_vocabulary_and_one_kind_of_norm(preset: str) -> None:
    """There was no cache, 256 ids were wired in, and the last norm was of another kind than the blocks'."""
    small = {"preset": preset, "d_model": 32, "n_layer": 2, "vocab_size": 300, "mlp": {"width": 48}}
    small |= {"attention": {"n_head": 2}} if preset == "bitbyte" else {}
    model = Model(ModelConfig.model_validate(small), dtype=torch.float64)
    redraw(model)
    model.eval()
    assert {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__} == {"RMSNorm"}
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 9)
    steps = [model.step(ids[:, t : t + 1], cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, atol=1e-9, rtol=1e-9)
    model.generate([[299, 1]], max_new_tokens=3)
    counts = [
        Model(ModelConfig.model_validate(small | {"mlp": mlp}), device="meta").parameter_counts()["total"]
        for mlp in ("none", {"width": 48})
    ]
    assert counts[0] < counts[1]  # a block may do without an MLP
