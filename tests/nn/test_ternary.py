"""The linear maps of a block as ternary ones: numbers of the original BitLinear, precision, parts, whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from plait.config.errors import BuildError
from plait.config.schema import LinearConfig, MLPConfig, ModelConfig
from plait.config.table import mixer_class
from plait.mixers.contract import Mixer
from plait.models.model import Model
from plait.nn.linear import make_linear
from plait.nn.mlp import MLP
from plait.nn.roles import MATRIX, VECTOR, VECTOR_FP32, cast_parameters, parameter_roles
from plait.nn.ternary import TernaryLinear
from plait.ops.ternary import int8_rows, ternary_weight
from tests.invariants import (
    VARIANTS,
    WIDTH,
    check_causal,
    check_fork,
    check_packed,
    check_packed_states,
    check_splits,
    check_steps,
    redraw,
)

BITLINEAR = load_file(Path(__file__).parents[1] / "fixtures" / "bitbyte" / "bitlinear.safetensors")
TERNARY = LinearConfig(kind="ternary")


def ternary(**options: object) -> LinearConfig:
    return LinearConfig.model_validate({"kind": "ternary", **options})


@pytest.mark.parametrize("case", ["act_on", "act_on_bias", "act_off", "act_off_bias"])
def test_the_original_layer(case: str) -> None:
    data = {k.removeprefix(f"{case}."): t for k, t in BITLINEAR.items() if k.startswith(f"{case}.")}
    config = ternary(activations="int8" if "on" in case.split("_")[1] else "none", ste="clipped")
    layer = make_linear(16, 12, bias="bias" in data, kind=config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(data[name])
    x = data["x"].clone().requires_grad_()
    y = layer(x)
    error = (y - data["y"]).abs() / data["y"].abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert error.max() <= 1e-5
    (y * data["w_out"]).sum().backward()
    found = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    wanted = {k.removeprefix("grad."): t for k, t in data.items() if k.startswith("grad.")}
    assert bool(wanted) == case.startswith("act_off")
    for name, true in wanted.items():
        gradient = found[name]
        assert gradient is not None and (gradient - true).abs().max() <= 1e-4 * true.abs().max(), name


def test_a_map_computes_with_what_its_weights_stand_for() -> None:
    layer = make_linear(8, 6, bias=True, kind=ternary(norm=True), parts=[2, 4])
    redraw(layer)
    x = torch.randn(5, 8)
    normed = F.rms_norm(x, (8,), layer.norm.weight, 1e-5)  # type: ignore[union-attr]
    want = F.linear(int8_rows(normed), ternary_weight(layer.weight, (2, 4)), layer.bias)
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize(("scale", "parts"), [("part", (2, 4)), ("matrix", (6,)), ("row", None)])
def test_who_shares_a_scale(scale: str, parts: tuple[int, ...] | None) -> None:
    layer = make_linear(8, 6, kind=ternary(scale=scale, activations="none"), parts=[2, 0, 4])
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), F.linear(x, ternary_weight(layer.weight, parts)))


def test_autocast_computes_in_float32_and_gives_what_a_dense_map_gives() -> None:
    layer = make_linear(32, 16, bias=True, kind=TERNARY)
    x = torch.randn(7, 32)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(32, 16)(x).dtype == torch.bfloat16
        assert torch.equal(y, exact.bfloat16())
        assert layer(x.double()).dtype == torch.bfloat16
    low = make_linear(32, 16, kind=TERNARY).bfloat16()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, F.linear(int8_rows(x.bfloat16().float()), ternary_weight(low.weight.float(), (16,))).bfloat16()
    )


@pytest.mark.parametrize("amp", [False, True])
def test_compile_sees_it_whole(amp: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = make_linear(8, 6, kind=ternary(norm=True, ste="clipped"), parts=[2, 4])
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        for rows in (3, 4, 5):
            x = torch.randn(rows, 8)
            results = []
            for run in (compiled, layer):
                y = run(x)
                results.append((y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))))
            for ours, true in zip(*results, strict=True):
                torch.testing.assert_close(ours, true)
    assert counter.frame_count <= 2


def test_roles_and_casts_are_those_of_a_linear_map() -> None:
    layer = make_linear(8, 6, bias=True, kind=ternary(norm=True))
    assert isinstance(layer, nn.Linear)
    assert parameter_roles(layer) == {"weight": MATRIX, "bias": VECTOR, "norm.weight": VECTOR_FP32}
    cast_parameters(layer, torch.bfloat16)
    assert {n: p.dtype for n, p in layer.named_parameters()}["norm.weight"] == torch.float32
    layer(torch.randn(3, 8).bfloat16()).float().sum().backward()


def test_an_empty_batch() -> None:
    assert make_linear(8, 6, kind=TERNARY)(torch.zeros(2, 0, 8)).shape == (2, 0, 6)


def test_a_name_is_a_kind_with_its_defaults() -> None:
    assert type(make_linear(4, 4)) is type(make_linear(4, 4, kind="dense")) is nn.Linear
    assert make_linear(4, 4, kind="ternary").config == TERNARY  # type: ignore[union-attr]
    with pytest.raises(BuildError, match=r"'tenary' is not a kind .*did you mean 'ternary'"):
        make_linear(4, 4, kind="tenary")
    with pytest.raises(BuildError, match=r"parts \[2, 1\] do not sum to the 4 outputs"):
        make_linear(4, 4, parts=[2, 1])


def ternary_maps(module: nn.Module) -> dict[str, TernaryLinear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, TernaryLinear)}


# each variant's maps with the outputs of the matrices that are joined in them
JOINED = {
    "attention": {"in_proj": (16, 8, 8), "out_proj": (16,)},
    "mamba": {"in_proj": (32, 32), "x_proj": (1, 5, 5), "out_proj": (16,)},
    "mamba full rank": {"in_proj": (16, 16), "x_proj": (4, 4), "out_proj": (16,)},
    "mamba separate": {
        "in_proj": (32, 32),
        "dt_proj": (32,),
        "B_proj": (3,),
        "C_proj": (3,),
        "out_proj": (16,),
    },
    "mamba2": {"in_proj": (32, 32, 6, 6, 4), "out_proj": (16,)},
    "mamba2 narrow": {"in_proj": (16, 16, 16, 16, 4, 4, 2), "out_proj": (16,)},
    "mamba3": {"in_proj": (32, 32, 6, 6, 4, 4, 4, 1), "out_proj": (16,)},
    "s4d": {"out_proj": (16, 16)},
}


@pytest.mark.parametrize("name", JOINED)
def test_which_maps_of_a_mixer_are_ternary(name: str) -> None:
    maps = ternary_maps(ternary_mixer(name, torch.float32))
    assert {n: m.parts for n, m in maps.items()} == JOINED[name]


def ternary_mixer(name: str, dtype: torch.dtype = torch.float64, **options: object) -> Mixer:
    kind, given = VARIANTS[name]
    cls = mixer_class(kind)
    mixer: Mixer = cls(cls.options_class(**given), WIDTH, linear=ternary(norm=True, **options)).to(dtype)
    redraw(mixer)
    return mixer.eval()


# in float64 alone: a last bit of float32 may move an activation over the edge between two of its 255 levels
@pytest.mark.parametrize("name", JOINED)
def test_the_invariants_hold_with_ternary_maps(name: str) -> None:
    mixer = ternary_mixer(name, scale="row")
    check_splits(mixer, 1e-12, in_place=False)
    check_splits(mixer, 1e-12, in_place=True, cuts=[(5, 0, 9), (1, 1, 1), (0, 30, 2)])
    check_steps(mixer, 1e-12, length=20)
    check_packed(mixer, 1e-12)
    check_packed_states(mixer, 1e-12)
    check_causal(mixer)
    check_fork(mixer)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_recurrent_gates_are_dense_and_say_so(name: str) -> None:
    with pytest.raises(BuildError, match="gates of a recurrent layer are dense; set linear: dense"):
        Model(ModelConfig(d_model=16, pattern=name, vocab_size=9, linear="ternary"))
    config = ModelConfig.model_validate(
        {
            "d_model": 16,
            "pattern": [{"mixer": name, "linear": "dense", "mlp": {"linear": "ternary"}}],
            "vocab_size": 9,
        }
    )
    assert list(ternary_maps(Model(config))) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


def test_an_mlp_has_the_blocks_maps_or_its_own() -> None:
    block = ternary(scale="row")
    assert {m.config for m in ternary_maps(MLP(MLPConfig(), 16, linear=block)).values()} == {block}
    own = MLP(MLPConfig.model_validate({"linear": {"kind": "ternary", "scale": "matrix"}}), 16, linear=block)
    assert {m.config.scale for m in ternary_maps(own).values()} == {"matrix"}
    assert not ternary_maps(MLP(MLPConfig.model_validate({"linear": "dense"}), 16, linear=block))
    gated = MLP(MLPConfig(kind="swiglu", width=24), 16, linear="ternary")
    assert gated.fc1.parts == (24, 24) and gated.flops(2) == 2 * 2 * 3 * 16 * 24  # type: ignore[union-attr]


MODEL = {
    "d_model": 16,
    "pattern": "M T M2 M3 S4D",
    "vocab_size": 29,
    "linear": {"kind": "ternary", "norm": True},
    "attention": {"n_head": 2},
    "mamba2": {"headdim": 8, "d_state": 6},
    "mamba3": {"headdim": 8, "d_state": 6},
}


def test_a_ternary_hybrid_on_the_meta_device_has_every_element_written() -> None:
    model = Model(ModelConfig.model_validate(MODEL), device="meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model = model.materialize("cpu")
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
    assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_a_ternary_hybrid_learns_a_fixed_batch() -> None:
    torch.manual_seed(0)
    model = Model(ModelConfig.model_validate(MODEL))
    ids = torch.randint(29, (2, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(0.0)
    for _ in range(150):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_cached_decoding_of_a_ternary_hybrid() -> None:
    model = Model(ModelConfig.model_validate(MODEL), dtype=torch.float64)
    redraw(model)
    model.eval()
    ids = torch.randint(29, (2, 12), generator=torch.Generator().manual_seed(0))
    whole: Tensor = model(ids).logits
    for cut in (0, 1, 5, 11):
        cache = model.new_cache(2, 12)
        pieces = [model.step(ids[:, :cut], cache)] if cut else []
        pieces += [model.step(ids[:, t : t + 1], cache) for t in range(cut, 12)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-10, rtol=1e-10)
