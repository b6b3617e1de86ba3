"""Small redrawn models for generation: their weights make every layer and every state matter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.config.schema import ModelConfig
from plait.models import Model
from tests.invariants import VARIANTS, redraw

VOCAB = 61
PATTERNS = {
    **{
        kind: [variant] for variant, (kind, _) in reversed(VARIANTS.items())
    },  # the first variant of each kind
    "attention window": ["attention window"],
    "hybrid": ["mamba2", "attention window", "lstm", "attention"],
    "hybrid that ends in Mamba": ["attention", "gru", "mamba2"],
}


def make_model(
    name: str | Sequence[str], *, dtype: torch.dtype = torch.float64, seed: int = 0, **more: object
) -> Model:
    """A model of width 16 with the layers of ``PATTERNS`` (or these variants), a vocabulary of 61 in 64 rows."""
    names = PATTERNS[name] if isinstance(name, str) else list(name)
    pattern = []
    for variant in names:
        kind, options = VARIANTS.get(variant, (variant, {}))
        widths = {"d_hidden": 16} if "d_hidden" in options else {}
        pattern.append({"mixer": kind, **options, **widths})
    # untied: a model that writes what it reads would repeat itself, whatever its state
    config = {"d_model": 16, "pattern": pattern, "vocab_size": VOCAB, "pad_vocab_size_multiple": 8}
    config |= {"mlp": "none", "head": {"tie": False}}
    model = Model(ModelConfig.model_validate({**config, **more}), dtype=dtype)
    redraw(model, seed)
    return model.eval()


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts, one of each length."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths]


def greedy_by_hand(model: Model, prompt: Sequence[int], n: int) -> list[int]:
    """Greedy decoding in its plainest form: the whole text through ``forward`` for every token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def rows_of(x: Tensor) -> list[list[int]]:
    """A tensor of ids as lists."""
    rows: list[list[int]] = x.tolist()
    return rows
