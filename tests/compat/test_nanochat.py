"""The nanochat hybrid's documents, call by call: GPT and GPTConfig, and what they promise, as numbers."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from plait.compat.nanochat.blocks import (
    BaseBlock,
    MambaBlock,
    TransformerBlock,
    create_block,
)
from plait.compat.nanochat.checkpoint_manager import load_checkpoint
from plait.compat.nanochat.engine import KVCache
from plait.compat.nanochat.gpt import GPT, GPTConfig
from plait.config.errors import BuildError
from plait.formats.nanochat_layout import to_theirs
from tests.compat.nanochat_models import V, config, ids, make, on_meta
from tests.invariants import close

FIXTURE = Path(__file__).parents[1] / "fixtures" / "nanochat_oct2025"


# ---------------------------------------------------------------- patterns


def test_by_default_every_block_is_a_transformer() -> None:
    model = on_meta(n_layer=20)
    assert len(model.transformer.h) == 20 and model.block_pattern == ["T"] * 20
    assert all(
        isinstance(block, TransformerBlock) and isinstance(block, BaseBlock) for block in model.transformer.h
    )
    assert [block.kind for block in model.model.blocks] == ["attention"] * 20
    assert model.config.n_embd == 768 and model.config.vocab_size == 50304  # as documented


def test_the_default_is_the_explicit_pattern_bit_for_bit() -> None:
    default = make(dtype=torch.float32)
    for pattern in (["T"] * 4, ["transformer"] * 4, ["t", "T", "Transformer", "T"]):
        explicit = make(pattern, dtype=torch.float32)
        explicit.load_state_dict(default.state_dict())
        assert torch.equal(explicit(ids(2, 9)), default(ids(2, 9)))


@pytest.mark.parametrize(
    "pattern",
    [
        ["M"] * 20,
        ["T"] * 12 + ["M"] * 8,
        ["T", "M"] * 10,
        ["T", "T"] + ["M"] * 7 + ["T"] + ["M"] * 6 + ["T", "M", "T", "T"],
        ["transformer", "mamba"] * 10,
    ],
    ids=["pure Mamba", "early T late M", "alternating", "strategic", "long names"],
)
def test_a_pattern_is_what_is_built(pattern: list[str]) -> None:
    model = on_meta(n_layer=20, block_pattern=pattern, mamba_d_state=16)
    kinds = {"t": "attention", "m": "mamba"}
    assert [block.kind for block in model.model.blocks] == [kinds[name[0].lower()] for name in pattern]
    for name, block in zip(pattern, model.transformer.h, strict=True):
        assert type(block) is (TransformerBlock if name[0].lower() == "t" else MambaBlock)
        assert (block.mlp is not None) == (name[0].lower() == "t")


def test_every_block_of_a_hybrid_matters() -> None:
    model = make(["T", "M", "M", "T"])
    before = model(ids(2, 20))
    for block in model.model.blocks:
        weight = block.mixer.out_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        assert (model(ids(2, 20)) - before).square().mean() > 1e-3
        with torch.no_grad():
            weight.copy_(kept)


def test_mambas_options_reach_it() -> None:
    block = create_block("M", config(mamba_d_state=24, mamba_d_conv=3, mamba_expand=3), 0)
    mixer: Any = block.mixer
    assert (mixer.d_inner, mixer.d_state, mixer.dt_rank) == (96, 24, 2)
    assert (
        mixer.conv1d.weight.shape == (96, 1, 3)
        and mixer.conv1d.bias is not None
        and mixer.in_proj.bias is None
    )
    with_mlp: Any = create_block("M", config(mamba_use_mlp=True), 0)
    assert with_mlp.mlp.fc1.out_features == 4 * 32 and with_mlp.mlp.kind == "relu2"


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"block_pattern: it has 2 block types, which must match the 4 layers"
    ):
        GPT(config(block_pattern=["T", "T"]))
    with pytest.raises(
        ValueError, match=r"block_pattern\[1\]: Unknown block type: .*'X' is not a kind.*mamba"
    ):
        GPT(config(n_layer=2, block_pattern=["T", "X"]))
    nineteen = ["T", "T"] + ["M"] * 6 + ["T"] + ["M"] * 6 + ["T", "M", "T", "T"]  # as the document prints it
    assert len(nineteen) == 19
    with pytest.raises(ValueError, match="must match"):
        on_meta(n_layer=20, block_pattern=nineteen)
    with pytest.raises(ValueError, match="n_head 5"):
        GPT(config(n_head=5))


# ---------------------------------------------------------------- forward


def test_the_forward_on_a_cpu_gives_logits_under_the_cap() -> None:
    model = make(["T", "M", "T", "M"], dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    logits = model(ids(2, 16))
    assert logits.shape == (2, 16, V) and logits.dtype == torch.float32
    assert 10 < logits.abs().max() < 15
    other = ids(2, 16)
    other[:, 9] = (other[:, 9] + 1) % V
    changed = model(other)
    assert torch.equal(changed[:, :9], logits[:, :9]) and not torch.equal(changed[:, 9:], logits[:, 9:])


def test_targets_are_shifted_already_and_minus_one_does_not_count() -> None:
    model = make(["T", "M"])
    idx, targets = ids(2, 8), ids(2, 8, seed=1)
    targets[0, :5] = -1
    cost = -model(idx).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != -1
    close(model(idx, targets, loss_reduction="none"), (cost * counted).flatten(), 1e-6, "each token")
    close(model(idx, targets), cost[counted].mean(), 1e-6, "mean")
    close(model(idx, targets, loss_reduction="sum"), cost[counted].sum(), 1e-6, "sum")
    with pytest.raises(BuildError, match="targets or kv_cache"):
        model(idx, targets, kv_cache=KVCache(2, 1, 8, 16, 2))


def test_the_originals_own_numbers() -> None:
    """Its checkpoint through load_checkpoint and load_state_dict: logits, losses, gradients, greedy ids."""
    tensors, _, meta = load_checkpoint(FIXTURE / "base_checkpoints" / "d4", 10)
    true = load_file(FIXTURE / "oracle.safetensors")
    model = GPT(GPTConfig(**meta["model_config"]))
    model.load_state_dict(tensors, strict=True, assign=True)
    logits = model(true["input_ids"])
    assert (logits - true["logits"]).abs().max() < 1e-4
    each = model(true["input_ids"], true["targets"], loss_reduction="none").view(2, 40)
    assert (each - true["loss_per_token"]).abs().max() < 1e-4
    loss = model(true["input_ids"], true["targets"])
    assert abs(loss - true["loss"]).item() < 1e-5
    loss.backward()
    found = to_theirs({n: p.grad for n, p in model.model.named_parameters()}, model.model.config)  # type: ignore[misc]
    for name in ("transformer.wte.weight", "transformer.h.1.attn.c_k.weight", "lm_head.weight"):
        grad = true[f"grad.{name}"]
        assert (found[name] - grad).abs().max() < 1e-4 * grad.abs().max()
    prompt = true["prompt"].tolist()
    assert list(model.generate(prompt, 24, temperature=0)) == true["greedy"].tolist()
    saved = model.state_dict()
    assert list(saved) == list(tensors) and all(torch.equal(saved[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_cache_continues_where_it_stopped_at_every_split(n_rows: int) -> None:
    """A hybrid whose last block is Mamba, too: positions are the model's, not the last layer's."""
    model = make(["T", "M", "T", "M"])
    idx = ids(1, 9).expand(n_rows, 9)
    whole = model(idx).detach()
    for cut in range(1, 9):
        first = KVCache(batch_size=1, num_heads=1, seq_len=cut + 2, head_dim=16, num_layers=4)
        close(model(idx[:1, :cut], kv_cache=first), whole[:1, :cut], 1e-12, "prefill")
        cache = KVCache(n_rows, 1, 9, 16, 4)
        cache.prefill(first)
        assert cache.get_pos() == cache.pos == cut
        for t in range(cut, 9):
            close(
                model(idx[:, t : t + 1], kv_cache=cache)[:, 0], whole[:, t], 1e-12, f"token {t} after {cut}"
            )
        assert cache.pos == 9
    cache.reset()
    assert cache.pos == 0
    close(model(idx, kv_cache=cache), whole, 1e-12, "after reset")


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model = make(["T", "M"])
    for wrong, words in (
        ({"num_layers": 3}, "num_layers is 3, but the GPT's is 2"),
        ({"num_heads": 2}, "num_heads is 2, but the GPT's is 1"),
        ({"head_dim": 8}, "head_dim is 8, but the GPT's is 16"),
    ):
        right = {"batch_size": 1, "num_heads": 1, "seq_len": 4, "head_dim": 16, "num_layers": 2}
        with pytest.raises(BuildError, match=words):
            model(ids(1, 2), kv_cache=KVCache(**{**right, **wrong}))
    cache = KVCache(1, 1, 4, 16, 2)
    model(ids(1, 4), kv_cache=cache)
    with pytest.raises(Exception, match="capacity of 4"):
        model(ids(1, 1), kv_cache=cache)
    with pytest.raises(BuildError, match="another GPT"):
        make(["T", "M"])(ids(1, 1), kv_cache=cache)
    with pytest.raises(BuildError, match="4 tokens do not fit in a cache of 3"):
        KVCache(1, 1, 3, 16, 2).prefill(cache)
    with pytest.raises(BuildError, match="fills an empty cache"):
        cache.prefill(cache)


def test_generate_yields_ids_one_by_one() -> None:
    model = make(["T", "M", "M"])
    prompt = ids(5).tolist()
    text = list(prompt)
    for _ in range(6):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    stream = model.generate(prompt, 6, temperature=0)
    assert inspect.isgenerator(stream) and next(stream) == text[5] and list(stream) == text[6:]
    assert list(model.generate(prompt, 6, top_k=1, seed=3)) == text[5:]
    warm = [list(model.generate(prompt, 12, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert {t for s in range(30) for t in model.generate(prompt, 1, 9.0, top_k=2, seed=s)} <= set(
        model(torch.tensor([prompt]))[0, -1].topk(2).indices.tolist()
    )


# ---------------------------------------------------------------- config, weights, optimizers


def test_the_config_goes_through_json() -> None:
    given = config(block_pattern=["T", "T", "M", "M"], mamba_d_state=32, mamba_use_mlp=True)
    again = GPTConfig(**json.loads(json.dumps(given.__dict__)))
    assert again == given and json.loads(json.dumps(asdict(given)))["block_pattern"] == ["T", "T", "M", "M"]
    assert [b.kind for b in GPT(again).model.blocks] == ["attention", "attention", "mamba", "mamba"]
    assert GPTConfig() == GPTConfig(1024, 50304, 12, 6, 6, 768, None, 16, 4, 2, False)


# What the originals' papers count is with the vocabulary of the October tokenizer, 65536.
COUNTS = {"T": 560_988_160, "M": 375_388_160, "T12M8": 486_748_160, "TM": 468_188_160}


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(None, "T"), (["M"] * 20, "M"), (["T"] * 12 + ["M"] * 8, "T12M8"), (["T", "M"] * 10, "TM")],
)
def test_parameters_at_depth_20(pattern: list[str] | None, name: str) -> None:
    model = on_meta(n_layer=20, n_embd=1280, n_head=10, n_kv_head=10, vocab_size=65536, block_pattern=pattern)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    per_block = sum(block.get_num_params() for block in model.transformer.h)
    assert per_block + model.transformer.wte.weight.numel() + model.lm_head.weight.numel() == COUNTS[name]


def test_a_transformer_and_a_mamba_are_of_like_size() -> None:
    counts = [
        create_block(name, GPTConfig(n_embd=128, n_head=2, n_kv_head=2), 0).get_num_params() for name in "TM"
    ]
    assert max(counts) < 2 * min(counts)


def test_flops_are_counted_block_by_block() -> None:
    sizes = {
        "n_layer": 20,
        "n_embd": 1280,
        "n_head": 10,
        "n_kv_head": 10,
        "vocab_size": 65536,
        "sequence_len": 2048,
    }
    transformer = on_meta(**sizes)
    matrices = COUNTS["T"] - 65536 * 1280
    assert transformer.estimate_flops() == 6 * matrices + 12 * 20 * 10 * 128 * 2048
    mamba, alternating = (on_meta(**sizes, block_pattern=p) for p in (["M"] * 20, ["T", "M"] * 10))
    both = (transformer.estimate_flops() + mamba.estimate_flops()) / 2
    assert alternating.estimate_flops() == both
    inner, states = 2560, 16
    scan = 2 * 4 * inner + 5 * inner * states  # convolution and recurrence, a token
    linear = 3 * inner * 1280 + inner * (80 + 32) + 80 * inner  # in, out, x, dt
    assert mamba.estimate_flops() == 20 * (6 * linear + 3 * scan) + 6 * 65536 * 1280
    longer = on_meta(**{**sizes, "sequence_len": 4096}, block_pattern=["M"] * 20)
    assert longer.estimate_flops() == mamba.estimate_flops()


def test_from_the_meta_device_every_element_is_written_as_each_block_begins() -> None:
    with torch.device("meta"):
        model = GPT(config(block_pattern=["T", "M", "M", "T"]))
    assert model.get_device().type == "meta"
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights()
    assert model.get_device().type == "cpu"
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.lm_head.weight.abs().max() == 0 and 0.9 < model.transformer.wte.weight.std() < 1.1
    for block in model.model.blocks:
        assert block.mixer.out_proj.weight.abs().max() == 0, "every block begins as the identity"
    mixer: Any = model.transformer.h[1].mixer
    steps = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 <= steps.min() < steps.max() <= 0.1 and torch.equal(mixer.D, torch.ones(64))
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(64, 16))
    query = model.state_dict()["transformer.h.0.attn.c_q.weight"]
    assert 0.8 < query.std() * math.sqrt(32) < 1.2


def test_every_parameter_is_in_one_optimizer_and_they_learn() -> None:
    torch.manual_seed(0)
    model = GPT(config(block_pattern=["T", "M", "T", "M"]))
    adamw, muon = model.setup_optimizers(
        unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, weight_decay=0.0
    )
    assert isinstance(adamw, torch.optim.AdamW)
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    by_adamw = [id(p) for group in adamw.param_groups for p in group["params"]]
    assert sorted([*by_muon, *by_adamw]) == sorted(id(p) for p in model.parameters())
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and not any(w in name for w in ("A_log", "embedding", "head"))
        assert (id(p) in by_muon) == matrix, name
    rates = {
        id(p): group["initial_lr"]
        for part in (adamw, muon)
        for group in part.param_groups
        for p in group["params"]
    }
    scale = (32 / 768) ** -0.5
    assert rates[id(model.transformer.wte.weight)] == pytest.approx(0.2 * scale)
    assert rates[id(model.lm_head.weight)] == pytest.approx(0.004 * scale)
    assert {group["initial_lr"] for group in muon.param_groups} == {0.02}
    idx, targets = ids(4, 16), ids(4, 16, seed=1)
    losses = []
    for _ in range(12):
        loss = model(idx, targets)
        loss.backward()
        losses.append(loss.item())
        for part in (adamw, muon):
            part.step()
            part.zero_grad(set_to_none=True)
    assert abs(losses[0] - math.log(V)) < 1e-3 and losses[-1] < losses[0] - 2


def test_a_decay_is_the_embeddings_and_the_outputs_alone() -> None:
    model = GPT(config(block_pattern=["T", "M", "M", "T"]))
    decays = {
        id(p): group["weight_decay"]
        for part in model.setup_optimizers(weight_decay=0.3)
        for group in part.param_groups
        for p in group["params"]
    }
    for p in model.parameters():
        special = p is model.lm_head.weight or p is model.transformer.wte.weight
        assert decays[id(p)] == (0.3 if special else 0.0)


def test_state_dicts_have_nanochats_names_and_come_back() -> None:
    model = make(["T", "M"], mamba_use_mlp=True)
    saved = model.state_dict()
    mixer = ["A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight"]
    mixer += ["dt_proj.weight", "dt_proj.bias", "out_proj.weight"]
    assert list(saved) == [
        "transformer.wte.weight",
        *(f"transformer.h.0.attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "c_proj")),
        *(f"transformer.h.0.mlp.{name}.weight" for name in ("c_fc", "c_proj")),
        *(f"transformer.h.1.mixer.{name}" for name in mixer),
        *(f"transformer.h.1.mlp.{name}.weight" for name in ("c_fc", "c_proj")),
        "lm_head.weight",
    ]
    again = GPT(model.config)
    again.load_state_dict({f"_orig_mod.{name}": tensor for name, tensor in saved.items()})
    close(again.double()(ids(2, 9)), model(ids(2, 9)), 1e-6, "loaded")
    assert set(torch.nn.Sequential(model).state_dict()) == {f"0.{name}" for name in saved}
    del saved["lm_head.weight"]
    with pytest.raises(Exception, match=r"lm_head\.weight is missing"):
        again.load_state_dict(saved)
    with pytest.raises(BuildError, match="strict must be True"):
        again.load_state_dict(saved, strict=False)
    other = make(["mamba2", "T"])
    more = GPT(other.config).double()
    more.load_state_dict(other.state_dict())
    assert torch.equal(more(ids(1, 5)), other(ids(1, 5)))


def test_torch_compile_takes_it() -> None:
    model = make(["T", "M"], dtype=torch.float32)
    compiled = torch.compile(model, dynamic=False, backend="eager")
    close(compiled(ids(2, 8)), model(ids(2, 8)), 1e-6, "compiled")
