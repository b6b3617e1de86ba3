"""Small models of the nanochat face for its tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.compat.nanochat.gpt import GPT, GPTConfig
from tests.invariants import redraw

V = 97


def config(**more: Any) -> GPTConfig:
    values = {"sequence_len": 32, "vocab_size": V, "n_layer": 4, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    return GPTConfig(**{**values, **more})


def make(pattern: Any = None, dtype: torch.dtype = torch.float64, **more: Any) -> GPT:
    """A small GPT in evaluation mode whose every branch matters."""
    n_layer = 4 if pattern is None else len(pattern)
    model = GPT(config(block_pattern=pattern, n_layer=n_layer, **more)).to(dtype)
    redraw(model)
    return model.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def on_meta(**more: Any) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(**more))
