"""BitByte's interface as its document prints it, under the changed import roots; its own numbers; hybrids.

Its trainer and data are in test_bitbyte_training.py, its commands in test_bitbyte_commands.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from plait.compat.bitbyte import models
from plait.compat.bitbyte.models import BitByteLM, BitLinear, Block, ByteLM, HybridLM
from plait.compat.bitbyte.models.mamba import MambaBlock, MambaSSM, SelectiveSSM
from plait.compat.bitbyte.models.mamba.ssm import S4Kernel
from plait.compat.bitbyte.models.mamba_mlm import MambaMLM
from plait.config.errors import BuildError, CheckpointError, ConfigError
from plait.config.schema import LinearConfig
from plait.formats.bitbyte import from_state_dict
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba
from plait.mixers.s4d import S4D
from plait.nn.ternary import TernaryLinear
from plait.ops.ternary import int8_rows, ternary_weight
from tests.invariants import redraw, rms

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bitbyte"
CASES: dict[str, Any] = json.loads((FIXTURES / "oracle.json").read_text())["cases"]
MODELS = [name for name in CASES if name != "bitlinear"]
LOGITS, ROUNDED = 1e-4, 2e-2  # the tolerances of the fixture's README; with rounded activations
SMALL: dict[str, Any] = {"n_layer": 4, "d_model": 32, "d_ff": 48}


def class_of(case: str) -> type[ByteLM]:
    return {"BitByteLM": BitByteLM, "MambaMLM": MambaMLM}[CASES[case]["class"]]


def bytes_of(rows: int, length: int) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0))


# ---- the document's snippets, at a smaller size


def test_create_a_mamba_model() -> None:
    model = MambaMLM(
        vocab_size=256,
        n_layer=3,
        d_model=48,
        d_ff=128,
        d_state=16,
        d_conv=4,
        expand=2,
        act_quant=True,
    )
    assert model(bytes_of(2, 9)).shape == (2, 9, 256)
    assert isinstance(model.norm_f, nn.LayerNorm) and model.lm_head.weight is model.tok_emb.weight
    # embedding N(0, 1 / sqrt(d))
    assert 0.97 < model.tok_emb.weight.std() * 48**0.5 < 1.03
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sizes["blocks.2.ssm.in_proj.weight"] == (192, 48)  # d_model -> 2 d_inner
    assert sizes["blocks.2.ssm.conv1d.weight"] == (96, 1, 4)  # depthwise, d_conv taps
    assert sizes["blocks.2.ssm.delta_proj.weight"] == (96, 96)  # a time step for each channel
    assert sizes["blocks.2.ssm.B_proj.weight"] == sizes["blocks.2.ssm.C_proj.weight"] == (16, 96)
    assert sizes["blocks.2.ssm.out_proj.weight"] == (48, 96)
    assert sizes["blocks.2.mlp.gate_up.weight"] == (256, 48)


def test_the_defaults_are_bitbytes() -> None:
    with torch.device("meta"):
        for model in (MambaMLM(), BitByteLM()):
            config = model.model.config
            assert (config.d_model, len(model.blocks), model.model.vocab_size) == (1536, 24, 256)
            assert model.model.blocks[0].mlp.fc2.in_features == 4096
            assert config.linear.activations == "int8" and model.sizes.act_quant
        assert [(b.kind, b.mixer.headdim) for b in model.model.blocks] == [("attention", 64)] * 24
        options = MambaMLM(n_layer=1).model.config.layers()[0].options
    assert (options.d_state, options.d_conv, options.expand) == (16, 4, 2)


def test_create_a_mamba_block() -> None:
    block = MambaBlock(d_model=48, d_ff=128, d_state=16, d_conv=4, expand=2, act_quant=True)
    redraw(block)
    x = torch.randn(2, 7, 48)
    assert isinstance(block.ssm, MambaSSM) and block.ssm is not block.mixer
    h = x + block.ssm(block.n1(x))
    torch.testing.assert_close(block(x), h + block.mlp(block.n2(h)))
    assert (block.n1.eps, block.n2.eps) == (1e-6, 1e-6)
    assert isinstance(Block(48, 2, 128).attn, nn.Module)
    kinds = Counter(type(m).__name__ for m in block.modules())
    assert kinds["TernaryLinear"] == 7 and kinds["Linear"] == 0  # in, out, delta, B, C; the MLP's two


def test_every_name_is_exported() -> None:
    assert set(models.__all__) == {
        *("BitByteLM", "BitLinear", "Block", "ByteLM", "HybridLM", "MambaBlock", "MambaMLM", "MambaSSM"),
        *("S4Kernel", "SelectiveSSM"),
    }
    assert all(isinstance(getattr(models, name), type) for name in models.__all__)


# ---- BitByte's own numbers


@pytest.mark.parametrize("act_quant", [True, False])
@pytest.mark.parametrize("case", MODELS)
def test_trained_weights_give_bitbytes_logits_and_come_back_unchanged(case: str, act_quant: bool) -> None:
    model = class_of(case)(**CASES[case]["config"], act_quant=act_quant).eval()
    tensors = load_file(FIXTURES / f"{case}_state_dict.safetensors")
    model.load_state_dict(tensors)
    true = load_file(FIXTURES / f"{case}.safetensors")
    error = (model(true["input_ids"]) - true[f"logits_act_{'on' if act_quant else 'off'}"]).abs()
    assert error.max() <= (ROUNDED if act_quant else LOGITS)
    assert (error.amax(-1) <= LOGITS).double().mean() > 0.95
    own = model.state_dict()
    assert list(own) == CASES[case]["state_dict_keys"]
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())
    if not act_quant:
        logits = model(true["input_ids"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), true["input_ids"][:, 1:].flatten())
        assert (loss - true["loss_act_off"]).abs() <= 1e-5


@pytest.mark.parametrize("case", MODELS)
def test_a_new_model_is_the_converted_one_but_for_gradients(case: str) -> None:
    settings = {**CASES[case]["config"], "act_quant": False}
    ours = class_of(case)(**settings).model.config
    theirs = from_state_dict(load_file(FIXTURES / f"{case}_state_dict.safetensors"), settings).config
    clipped = json.loads(json.dumps(ours.model_dump()).replace("identity", "clipped"))
    found = json.loads(json.dumps(theirs.model_dump()))
    for values in (clipped, found):
        values.pop("init")  # how weights begin
    assert clipped == found and ours.linear.ste == "identity"


def test_bitlinear() -> None:
    true = load_file(FIXTURES / "bitlinear.safetensors")
    for case in ("act_on", "act_on_bias", "act_off", "act_off_bias"):
        layer = BitLinear(16, 12, bias=case.endswith("bias"), act_quant=case.startswith("act_on"))
        assert layer.bias is None or layer.bias.abs().sum() == 0
        bound = layer.weight.abs().max() * 16**0.5  # kaiming_uniform(a = sqrt 5)
        assert 0.95 < bound <= 1.0
        with torch.no_grad():
            layer.weight.copy_(true[f"{case}.weight"])
            if layer.bias is not None:
                layer.bias.copy_(true[f"{case}.bias"])
        y = layer(true[f"{case}.x"])
        error = (y - true[f"{case}.y"]).abs().amax(-1) / true[f"{case}.y"].abs().amax(-1).clamp(min=1e-30)
        assert error.max() <= 1e-5


def test_weights_of_another_family_or_size_are_refused() -> None:
    attention, mamba = (
        load_file(FIXTURES / f"{c}_state_dict.safetensors") for c in ("bitbytelm_mha", "mambamlm")
    )
    sizes = {"n_layer": 2, "d_model": 28, "d_ff": 48, "n_head": 2}
    with pytest.raises(CheckpointError, match="block 0 of the weights is attention, of this MambaMLM mamba"):
        MambaMLM(**{k: v for k, v in sizes.items() if k != "n_head"}).load_state_dict(attention)
    with pytest.raises(CheckpointError, match="block 0 of the weights is mamba, of this BitByteLM attention"):
        BitByteLM(**sizes).load_state_dict(mamba)
    with pytest.raises(CheckpointError, match=r"blocks.0.ssm.A_log is .* of shape \(56, 16\)"):
        MambaMLM(n_layer=2, d_model=28, d_ff=48).load_state_dict(mamba)  # its d_state is 8
    right = MambaMLM(n_layer=2, d_model=28, d_ff=48, d_state=8)
    with pytest.raises(CheckpointError, match="has no place in the model"):
        right.load_state_dict({**mamba, "extra": torch.zeros(1)})
    no_bias = {n: t for n, t in mamba.items() if n != "norm_f.bias"}
    with pytest.raises(CheckpointError, match="another last norm"):
        right.load_state_dict(no_bias)
    with pytest.raises(CheckpointError, match="taken whole"):
        right.load_state_dict(mamba, strict=False)


# ---- hybrids, generation


def test_hybrids_of_both_kinds_of_block() -> None:
    model = HybridLM(**SMALL, n_head=2)
    assert model.pattern == ["mamba", "mamba", "attention", "attention"]
    assert [type(block) for block in model.blocks] == [MambaBlock, MambaBlock, Block, Block]
    assert type(model.norm_f).__name__ == "RMSNorm"
    for pattern in ("M T*2 M", ["mamba", "attention", "T", "m"]):
        model = HybridLM(**SMALL, n_head=2, pattern=pattern)
        assert model.pattern == ["mamba", "attention", "attention", "mamba"]
    for pattern, message in (
        ("M T", "it has 2 blocks, but n_layer is 4"),
        ("M*3 M2", "a block is named mamba or attention"),
        ([{"mixer": "mamba", "d_state": 3}, "T", "T", "T"], "has no options"),
    ):
        with pytest.raises(BuildError, match=message):
            HybridLM(**SMALL, n_head=2, pattern=pattern)
    with pytest.raises(ConfigError, match="d_ff: expected a whole number"):
        MambaMLM(d_ff=0)


@pytest.mark.parametrize("cls", [BitByteLM, MambaMLM, HybridLM])
def test_cached_generation_equals_the_whole_run(cls: type[ByteLM]) -> None:
    model = cls(**SMALL, **({} if cls is MambaMLM else {"n_head": 2}), act_quant=False)
    redraw(model.model)
    ids = bytes_of(2, 7)
    found = model.generate(ids, 8, temperature=0.0)
    want = ids
    for _ in range(8):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, want)
    drawn = model.generate(ids, 3, temperature=0.8, top_k=2)
    assert drawn.shape == (2, 10) and drawn.max() < 256
    changed = ids.clone()
    changed[:, 4] += 1
    assert torch.equal(model(ids)[:, :4], model(changed % 256)[:, :4])  # no byte sees a later one


def test_recomputed_blocks_have_the_same_gradients() -> None:
    plain, recomputing = (HybridLM(**SMALL, n_head=2) for _ in range(2))
    recomputing.load_state_dict(plain.state_dict())
    recomputing.gradient_checkpointing_enable()
    ids, kept = bytes_of(2, 40), []
    for model in (plain, recomputing):
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(ids).square().mean()
        loss.backward()
        kept.append(total)
    assert kept[1] < 0.5 * kept[0]
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert rms(b.grad, a.grad) < 1e-5


def test_blocks_in_a_module_of_ones_own() -> None:
    """The way to a hybrid that its quick start shows: the first half Mamba, the second attention."""
    torch.manual_seed(0)

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 32)
            self.blocks = nn.ModuleList(
                MambaBlock(d_model=32, d_ff=48) if i < 2 else Block(d_model=32, n_head=2, d_ff=48)
                for i in range(4)
            )

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for block in self.blocks:
                x = block(x)
            return x @ self.table.weight.T

    model, ids = Mine(), bytes_of(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- mixers by themselves


def test_mamba_ssm_is_plaits_mamba_with_ternary_maps() -> None:
    ssm = MambaSSM(d_model=24, d_state=5, d_conv=3, expand=3)
    redraw(ssm)
    x = torch.randn(2, 11, 24)
    y = ssm(x)
    assert isinstance(ssm, Mamba) and torch.equal(y, Mamba.forward(ssm, x, Layout.dense(2, 11))[0])
    state = ssm.init_state(2)
    steps = [ssm.step(x[:, t : t + 1], Layout.dense(2, 1), state) for t in range(11)]
    assert rms(torch.cat(steps, 1), y) < 1e-5
    maps = {n for n, m in ssm.named_modules() if isinstance(m, TernaryLinear)}
    assert maps == {"in_proj", "dt_proj", "B_proj", "C_proj", "out_proj"}
    full = MambaSSM(d_model=24, d_state=5, d_conv=3, expand=3, act_quant=False)
    full.load_state_dict(ssm.state_dict())
    assert 1e-3 < rms(full(x), y) < 0.2  # 8-bit activations
    assert ssm.in_proj.config == LinearConfig(kind="ternary", scale="matrix")


def test_selective_ssm_is_the_recurrence_that_it_says() -> None:
    ssm = SelectiveSSM(d_model=6, d_state=3)
    redraw(ssm)
    x = torch.randn(1, 9, 6)

    def bit(layer: BitLinear) -> Tensor:
        return F.linear(int8_rows(x), ternary_weight(layer.weight, (layer.out_features,)))

    dt = F.softplus(bit(ssm.delta_proj) + ssm.dt_bias)
    B, C = bit(ssm.B_proj), bit(ssm.C_proj)
    h, want = torch.zeros(6, 3), []
    for t in range(9):
        h = torch.exp(-dt[0, t, :, None] * ssm.A_log.exp()) * h + (dt * x)[0, t, :, None] * B[0, t]
        want.append(h @ C[0, t] + ssm.D * x[0, t])
    assert rms(ssm(x), torch.stack(want)[None]) < 1e-5
    ssm(x).sum().backward()
    assert all(p.grad is not None for p in ssm.parameters())
    fresh = F.softplus(SelectiveSSM(500).dt_bias)
    assert 1e-3 <= fresh.min() < 2e-3 and 0.05 < fresh.max() <= 0.1001


def test_s4_kernel_is_a_convolution_with_spread_frequencies() -> None:
    layer = S4Kernel(d_model=5, d_state=8)
    assert isinstance(layer, S4D) and layer.is_complex
    ratios = layer.A_imag[:, 1:] / layer.A_imag[:, :-1]
    torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios))  # log-spaced
    assert (layer.A_log.exp() > 0).all()  # decays: the real part is its negative
    kernel, x = layer.kernel(40), torch.randn(2, 40, 5)
    want = torch.stack(
        [sum((kernel[j] * x[:, t - j] for j in range(t + 1)), torch.zeros(2, 5)) for t in range(40)], 1
    )
    assert rms(layer(x), want) < 1e-5
    # zero-order hold: the response at n is 2 Re sum C (exp(dt A) - 1) / A exp(n dt A), and D at 0
    A = torch.complex(-layer.A_log.exp(), layer.A_imag).to(torch.complex128)
    dt = layer.log_dt.exp()[:, None].double()
    C, B = (torch.view_as_complex(p.detach()) for p in (layer.C, layer.B))
    n = torch.arange(40, dtype=torch.float64)[:, None, None]
    response = 2 * (C * B * torch.expm1(dt * A) / A * torch.exp(n * dt * A)).sum(-1).real
    response[0] += layer.D.double()
    assert rms(kernel, response) < 1e-5
    layer(x).sum().backward()
    assert layer.log_dt.grad is not None
    fixed = S4Kernel(5, trainable_dt=False)
    assert not fixed.log_dt.requires_grad and fixed.A_log.requires_grad
    state = layer.init_state(2)
    steps = [layer.step(x[:, t : t + 1], Layout.dense(2, 1), state) for t in range(40)]
    assert rms(torch.cat(steps, 1), layer(x)) < 1e-5
