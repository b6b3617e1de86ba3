"""The presets mamba, mamba2, gpt2 and bert, given random weights of Hugging Face's models, give their logits.

transformers is needed by this test alone; nothing is downloaded.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from plait.config.schema import ModelConfig
from plait.formats.huggingface import bert, gpt2
from plait.formats.huggingface.names import Names, one_of, renamed
from plait.formats.native import fill_weights
from plait.models.model import Model
from tests.invariants import redraw, rms

TOLERANCE = 1e-4
VOCAB, LENGTH = 90, 40  # the vocabulary is no multiple of what the presets pad to
LAYER = r"backbone\.layers\.(\d+)\."
MAMBA: Names = (
    (r"backbone\.embeddings\.", "embedding.tokens."),
    (LAYER + r"norm\.", r"blocks.\1.norm1."),
    (LAYER + r"mixer\.", r"blocks.\1.mixer."),
    (r"backbone\.norm_f\.", "final_norm."),
    (r"lm_head\.", "head.unembedding."),
)


class Pair(NamedTuple):
    ours: Model
    theirs: nn.Module


def translate(family: str, model: nn.Module, tied: bool, rows: int) -> dict[str, Tensor]:
    """Their weights under our names, the vocabulary padded to ``rows`` with numbers that must not matter."""
    theirs = model.state_dict()
    match family:
        case "gpt2":
            weights = gpt2.weights(theirs, tied=tied)
        case "bert":
            weights = bert.weights(theirs, tied=tied)
        case _:
            if tied:
                theirs = one_of(theirs, "backbone.embeddings.weight", "lm_head.weight", family)
            weights = renamed(theirs, MAMBA, family)
    for name in ("embedding.tokens.weight", "head.unembedding.weight", "head.unembedding.bias"):
        if name in weights:
            weight = weights[name]
            weights[name] = torch.cat([weight, weight.new_full((rows - VOCAB, *weight.shape[1:]), 50.0)])
    return weights


@cache
def build(family: str) -> Pair:
    """A shrunk preset with the redrawn weights of a transformers model of the same shape."""
    ours: dict[str, Any] = {"preset": family, "vocab_size": VOCAB, "n_layer": 3}
    theirs: dict[str, Any] = {
        "vocab_size": VOCAB,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    make: Any
    match family:
        case "mamba":
            ours |= {"d_model": 24, "mamba": {"d_state": 5}}
            theirs |= {"hidden_size": 24, "state_size": 5, "num_hidden_layers": 3}
            make = lambda tie: MambaForCausalLM(MambaConfig(tie_word_embeddings=tie, **theirs))  # noqa: E731
        case "mamba2":
            ours |= {"d_model": 32, "mamba2": {"d_state": 8, "headdim": 16, "ngroups": 2}}
            theirs |= {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 3}
            theirs |= {"head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 16}
            make = lambda tie: Mamba2ForCausalLM(Mamba2Config(tie_word_embeddings=tie, **theirs))  # noqa: E731
        case "gpt2":
            ours |= {"d_model": 24, "attention": {"n_head": 3}, "embedding": {"max_positions": 50}}
            theirs |= {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 50}
            make = lambda tie: GPT2LMHeadModel(GPT2Config(tie_word_embeddings=tie, **theirs))  # noqa: E731
        case _:
            ours |= {"d_model": 24, "attention": {"n_head": 3}, "embedding": {"max_positions": 50}}
            ours |= {"mlp": {"width": 40}}
            theirs |= {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
            theirs |= {"intermediate_size": 40, "max_position_embeddings": 50}
            make = lambda tie: BertForMaskedLM(BertConfig(tie_word_embeddings=tie, **theirs))  # noqa: E731
    model = Model(ModelConfig(**ours)).eval()
    other = make(model.config.head.tie).eval()
    redraw(other)
    tied = model.config.head.tie
    fill_weights(model, translate(family, other, tied, model.embedding.tokens.weight.shape[0]), family)
    return Pair(model, other)


CAUSAL = ["mamba", "mamba2", "gpt2"]
families = pytest.mark.parametrize("family", [*CAUSAL, "bert"])


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def pads(side: str) -> Tensor:
    """Three rows of which two are padded, one of them down to a single token."""
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, 25:] = 0
    mask[2, 1:] = 0
    return mask if side == "right" else mask.flip(1)


def same(ours: Tensor, theirs: Tensor) -> None:
    error = rms(ours, theirs)
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@families
@torch.no_grad()
def test_logits(family: str) -> None:
    pair = build(family)
    ids = tokens()
    logits = pair.ours(ids).logits
    assert logits.shape == (3, LENGTH, VOCAB)
    same(logits, pair.theirs(input_ids=ids).logits)


@families
def test_loss_and_gradient(family: str) -> None:
    pair = build(family)
    ids = tokens()
    labels = ids.clone()
    labels[:, ::3] = -100
    ours = pair.ours(ids, labels=labels).loss
    theirs = pair.theirs(input_ids=ids, labels=labels).loss
    assert ours is not None
    same(ours, theirs)
    (mine,) = torch.autograd.grad(ours, [pair.ours.embedding.tokens.weight])
    (other,) = torch.autograd.grad(theirs, [pair.theirs.get_input_embeddings().weight])
    same(mine[:VOCAB], other)
    assert not mine[VOCAB:].any()


# left-padded, their BERT counts positions from the pads; a BERT never sees that
@pytest.mark.parametrize(
    ("family", "side"), [*((f, s) for f in CAUSAL for s in ("left", "right")), ("bert", "right")]
)
@torch.no_grad()
def test_padded_rows(family: str, side: str) -> None:
    pair, ids, mask = build(family), tokens(), pads(side)
    more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if family == "gpt2" else {}
    theirs = pair.theirs(input_ids=ids, attention_mask=mask, **more).logits
    real = mask.bool()
    same(pair.ours(ids, attention_mask=mask).logits[real], theirs[real])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_token_types_of_bert(padded: bool) -> None:
    bert, ids, types = build("bert"), tokens(), tokens(seed=1) % 2
    mask = pads("right") if padded else torch.ones_like(ids)
    theirs = bert.theirs(input_ids=ids, token_type_ids=types, attention_mask=mask).logits
    real = mask.bool()
    same(bert.ours(ids, token_type_ids=types, attention_mask=mask).logits[real], theirs[real])
    assert rms(bert.ours(ids, attention_mask=mask).logits[real], theirs[real]) > 100 * TOLERANCE


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_cached_steps(family: str) -> None:
    pair, ids = build(family), tokens()
    cache = pair.ours.new_cache(3, LENGTH)
    pieces = [pair.ours.step(piece, cache) for piece in ids.split([1, 20, 16, 1, 1, 1], 1)]
    same(torch.cat(pieces, 1), pair.theirs(input_ids=ids).logits)


@families
@torch.no_grad()
def test_every_weight_matters(family: str) -> None:
    """A wrong mapping would be seen: each weight, changed a little, moves the logits by many tolerances."""
    pair, ids = build(family), tokens()
    theirs = pair.theirs(input_ids=ids).logits
    g = torch.Generator().manual_seed(0)
    for name, p in pair.ours.named_parameters():
        kept = p.clone()
        p.mul_(1 + 0.1 * torch.randn(p.shape, generator=g)).add_(0.02 * torch.randn(p.shape, generator=g))
        error = rms(pair.ours(ids).logits, theirs)
        p.copy_(kept)
        assert error > 10 * TOLERANCE, f"{name} moves the logits by {error:.1e}"
