"""Blocks of the nanochat face: the factory, each kind's numbers, and types of one's own."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait.compat.nanochat as package
from plait.compat.nanochat.blocks import (
    BaseBlock,
    MambaBlock,
    MixerBlock,
    TransformerBlock,
    create_block,
    register_block,
)
from plait.compat.nanochat.engine import KVCache
from plait.compat.nanochat.gpt import GPT, MLP, apply_rotary_emb, norm
from plait.config.errors import BuildError, ConfigError
from plait.config.originals.nanochat import WHOLE_BLOCKS
from plait.config.table import TABLE
from plait.inference import decoding
from tests.compat.nanochat_models import config, ids, make
from tests.invariants import close

# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("name", "cls", "kind"),
    [
        ("T", TransformerBlock, "attention"),
        ("t", TransformerBlock, "attention"),
        ("transformer", TransformerBlock, "attention"),
        ("Transformer", TransformerBlock, "attention"),
        ("M", MambaBlock, "mamba"),
        ("MAMBA", MambaBlock, "mamba"),
        ("mamba2", MixerBlock, "mamba2"),
        ("lstm", MixerBlock, "lstm"),
    ],
)
def test_the_factory_knows_names_in_any_case(name: str, cls: type, kind: str) -> None:
    block: Any = create_block(name, config(), 3)
    assert type(block) is cls and isinstance(block, BaseBlock) and isinstance(block, nn.Module)
    assert block.block.kind == kind and block.layer_idx == 3 and block.config == config()
    assert block(torch.randn(2, 5, 32)).shape == (2, 5, 32)


@pytest.mark.parametrize("wrong", ["X", "mamb", "", 7])
def test_the_factory_names_what_there_is(wrong: Any) -> None:
    hint = r".*did you mean 'mamba" if wrong == "mamb" else ""
    with pytest.raises(
        ValueError, match=f"Unknown block type: {wrong!r}; there are T .transformer., M .mamba.{hint}"
    ):
        create_block(wrong, config(), 0)


def test_a_block_tells_its_type_and_its_parameters() -> None:
    transformer, mamba = create_block("T", config(), 0), create_block("M", config(), 0)
    assert transformer.get_block_type() == "TransformerBlock" and mamba.get_block_type() == "MambaBlock"
    assert create_block("gru", config(), 0).get_block_type() == "gru"
    assert transformer.get_num_params() == (32 + 2 * 16 + 32) * 32 + 8 * 32 * 32
    inner, states, rank = 64, 16, 2
    assert mamba.get_num_params() == (
        2 * inner * 32 + inner * 4 + inner + inner * (rank + 2 * states) + inner * rank + inner  # in, conv, x, dt
        + inner * states + inner + 32 * inner  # A, D, out
    )  # fmt: skip
    with pytest.raises(TypeError, match="abstract"):
        BaseBlock(config(), 0)  # type: ignore[abstract]


def test_the_loop_over_the_blocks_that_the_document_prints_is_the_models_forward() -> None:
    model = make(["T", "M", "mamba", "T"], dtype=torch.float32)
    idx = ids(2, 12)
    cos_sin = model.cos[:, :12], model.sin[:, :12]
    kv_cache = None
    x = norm(model.transformer.wte(idx))
    for block in model.transformer.h:
        if hasattr(block, "attn"):
            context = {"cos_sin": cos_sin, "kv_cache": kv_cache}
        else:
            context = {}
        x = block(x, context)
    logits = 15 * torch.tanh(model.lm_head(norm(x)) / 15)
    close(logits, model(idx), 1e-6, "block by block")


def test_a_blocks_context_is_used_or_refused() -> None:
    model = make(["T", "M"], dtype=torch.float32)
    transformer, mamba = model.transformer.h
    x = torch.randn(1, 6, 32)
    tables = model.cos[:, :6], model.sin[:, :6]
    assert torch.equal(mamba(x, {"cos_sin": tables}), mamba(x))
    assert torch.equal(transformer(x, {"cos_sin": tables, "kv_cache": None}), transformer(x))
    with pytest.raises(BuildError, match="not the tables of the 6 positions of x from 0 on"):
        transformer(x, {"cos_sin": (model.cos[:, 1:7], model.sin[:, 1:7])})
    with pytest.raises(BuildError, match="kv_cache: a block alone keeps no state"):
        transformer(x, {"kv_cache": KVCache(1, 1, 8, 16, 2)})
    with pytest.raises(BuildError, match=r"'cos_sinn', which no block knows .did you mean 'cos_sin'"):
        mamba(x, {"cos_sinn": tables})


def test_a_transformer_block_is_the_formula() -> None:
    """Written out: rotation by minus theta with tables in bfloat16, QK norm after it, squared ReLU."""
    model = make(["T"])
    block: Any = model.transformer.h[0]
    named = {name.removeprefix("transformer.h.0."): w.double() for name, w in model.state_dict().items()}
    x = torch.randn(1, 7, 32, dtype=torch.float64)

    def rms(t: Tensor) -> Tensor:
        return t * (t.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()

    angle = torch.outer(torch.arange(7).float(), 10000.0 ** (-torch.arange(0, 16, 2).float() / 16))
    cos, sin = (f(angle).bfloat16().double() for f in (torch.cos, torch.sin))

    def turned(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos + b * sin, -a * sin + b * cos], -1)

    h = rms(x[0])
    q = (h @ named["attn.c_q.weight"].T).view(7, 2, 16).transpose(0, 1)
    k = (h @ named["attn.c_k.weight"].T)[None].expand(2, 7, 16)
    v = (h @ named["attn.c_v.weight"].T)[None].expand(2, 7, 16)
    scores = rms(turned(q)) @ rms(turned(k)).mT / 4 + torch.full((7, 7), -math.inf).triu(1)
    y = x[0] + (scores.softmax(-1) @ v).transpose(0, 1).reshape(7, 32) @ named["attn.c_proj.weight"].T
    y = y + F.relu(rms(y) @ named["mlp.c_fc.weight"].T).square() @ named["mlp.c_proj.weight"].T
    close(block(x)[0], y, 1e-6, "the block")  # the names' copies are in float32


def test_the_pieces_for_blocks_of_ones_own() -> None:
    x = torch.randn(2, 3, 32)
    close(norm(x), x * (x.square().mean(-1, keepdim=True) + 1.1920929e-07).rsqrt(), 1e-6, "norm")
    mlp = MLP(config())
    close(mlp(x), F.relu(x @ mlp.fc1.weight.T).square() @ mlp.fc2.weight.T, 1e-6, "MLP")
    heads, (cos, sin) = torch.randn(2, 3, 2, 16), (torch.randn(1, 3, 1, 8) for _ in range(2))
    a, b = heads.chunk(2, -1)
    turned = torch.cat([a * cos + b * sin, -a * sin + b * cos], -1)
    close(apply_rotary_emb(heads, cos, sin), turned, 1e-6, "rotation by minus the angle")
    with pytest.raises(BuildError, match=r"takes .B, T, heads, width.; got .2, 3, 32."):
        apply_rotary_emb(x, x, x)


# ---------------------------------------------------------------- a block of one's own


@pytest.fixture
def ema() -> Iterator[str]:
    """A user's block type: no line of Plait or of the face was changed for it."""

    @register_block("ema_block", aliases=("E",))
    class EMA(BaseBlock):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
            self.keep = nn.Parameter(torch.full((config.n_embd,), 0.5))
            nn.init.constant_(self.proj.weight, 0.125)

        def forward(self, x: Tensor, context: dict[str, Any] | None = None) -> Tensor:
            assert context is not None
            cos, sin = context["cos_sin"]
            assert context["kv_cache"] is None and cos.shape == (1, x.shape[1], 1, 8)
            h, out = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                h = self.keep * h + norm(x[:, t])
                out.append(h)
            y = torch.stack(out, 1).unflatten(-1, (2, 16))
            return x + self.proj(apply_rotary_emb(y, cos, sin).flatten(-2))

    yield "ema_block"
    TABLE.pop("ema_block")
    WHOLE_BLOCKS.discard("ema_block")


def test_a_block_of_ones_own_is_built_by_its_name(ema: str) -> None:
    block = create_block("E", config(), 1)
    assert block.get_block_type() == "EMA" and block.get_num_params() == 32 * 32 + 32
    model = GPT(config(block_pattern=["T", ema, "M", "E"]))
    own = model.transformer.h[1]
    assert type(own) is type(block) and own.layer_idx == 1 and own.config == model.config
    assert torch.equal(own.proj.weight, torch.full((32, 32), 0.125)), "it begins as its constructor says"
    plain = model.model.config.layers()[1].block
    assert (plain.norm.kind, plain.residual.kind, plain.mlp.kind) == ("none", "none", "none")
    with pytest.raises(BuildError, match="cannot be replaced"):
        model.transformer.h[1] = block
    with pytest.raises(ConfigError, match="takes a subclass of BaseBlock"):
        register_block("wrong")(nn.Linear)  # type: ignore[type-var]


def test_a_hybrid_with_it_trains_and_generates(ema: str) -> None:
    torch.manual_seed(0)
    model = GPT(config(block_pattern=["T", "E", "M", "E"]))
    optimizers = model.setup_optimizers()
    own = model.transformer.h[1]
    groups = {id(p): part for part in optimizers for group in part.param_groups for p in group["params"]}
    assert groups[id(own.proj.weight)] is optimizers[1] and groups[id(own.keep)] is optimizers[0]
    idx, targets = ids(4, 12), ids(4, 12, seed=1)
    before = [p.detach().clone() for p in own.parameters()]
    losses = []
    for _ in range(12):
        loss = model(idx, targets)
        loss.backward()
        losses.append(loss.item())
        for part in optimizers:
            part.step()
            part.zero_grad(set_to_none=True)
    assert losses[-1] < losses[0] - 1
    assert all(not torch.equal(a, b) for a, b in zip(before, own.parameters(), strict=True))
    model.eval()
    prompt = ids(5).tolist()
    text = list(prompt)
    for _ in range(4):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    decoding._say_once.cache_clear()
    with pytest.warns(UserWarning, match=r"layer 1 \(ema_block\) keeps no state"):
        assert list(model.generate(prompt, 4, temperature=0)) == text[5:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(model.generate(prompt, 2))
    with pytest.raises(BuildError, match=r"layer 1 \(ema_block\) is not stateful"):
        model(ids(1, 2), kv_cache=KVCache(1, 1, 4, 16, 4))


def test_it_is_no_mixer_of_an_ordinary_model(ema: str) -> None:
    from plait.config.schema import ModelConfig
    from plait.models import Model

    with pytest.raises(BuildError, match="is a whole block of a nanochat model"):
        Model(ModelConfig(d_model=32, pattern=[ema], vocab_size=5))


# ---------------------------------------------------------------- the package


def modules() -> list[str]:
    return [
        m.name for m in walk_packages(package.__path__, f"{package.__name__}.") if ".configs." not in m.name
    ]


def test_every_public_name_is_typed_and_explained() -> None:
    found = 0
    for name in modules():
        module = import_module(name)
        assert module.__doc__, name
        for label, value in vars(module).items():
            if label.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            members = [value]
            if inspect.isclass(value):
                members += [
                    m for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")
                ]
            for member in members:
                found += 1
                assert inspect.getdoc(member), f"{name}.{label}: {member}"
                if inspect.isfunction(member):
                    signature = inspect.signature(member)
                    untyped = [
                        p
                        for p in signature.parameters.values()
                        if p.annotation is p.empty and p.name not in ("self", "cls")
                    ]
                    assert not untyped and signature.return_annotation is not signature.empty, (
                        f"{name}.{label}"
                    )
    assert found > 60


def test_the_documents_import_command_runs_and_no_module_needs_another_first() -> None:
    """One interpreter; each module is imported with none of the others loaded."""
    code = (
        "from plait.compat.nanochat.blocks import create_block; print('Import successful')\n"
        "import importlib, sys\n"
        f"for name in {modules()!r}:\n"
        "    for loaded in [m for m in sys.modules if m.startswith('plait.compat')]:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout == "Import successful\n", run.stderr


def test_a_changed_field_is_a_new_config() -> None:
    given = config(block_pattern=["T"] * 4)
    model = GPT(given)
    assert model.config == given and model.config.block_pattern is not given.block_pattern
    with pytest.raises(Exception, match="cannot assign"):
        given.n_layer = 3  # type: ignore[misc]
    assert replace(given, n_layer=3).n_layer == 3
