"""Changing the vocabulary of a built model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.models.heads import LMHead

if TYPE_CHECKING:
    from plait.models.model import Model


@torch.no_grad()
def resize_vocabulary(model: Model, vocab_size: int) -> None:
    """Give the embedding and the head ``vocab_size`` ids; kept ids keep their rows, new ones are N(0, init_std)."""
    if vocab_size < 1:
        raise BuildError(f"vocab_size {vocab_size} is not allowed: a vocabulary has at least one id")
    multiple = model.config.pad_vocab_size_multiple
    rows = -(-vocab_size // multiple) * multiple
    kept = min(vocab_size, model.vocab_size)
    std = model.config.init_std
    tokens = model.embedding.tokens
    tokens.weight = nn.Parameter(_resized(tokens.weight, rows, kept, std))
    tokens.num_embeddings = rows
    if isinstance(model.head, LMHead):
        unembedding = model.head.unembedding
        model.head.vocab_size = vocab_size
        if unembedding.tied:
            unembedding.weight = tokens.weight
        else:
            unembedding.weight = nn.Parameter(_resized(unembedding.weight, rows, kept, std))
        if unembedding.bias is not None:
            unembedding.bias = nn.Parameter(_resized(unembedding.bias, rows, kept, 0.0))
    model.vocab_size = vocab_size
    model.config = model.config.model_copy(update={"vocab_size": vocab_size})


def _resized(old: Tensor, rows: int, kept: int, std: float) -> Tensor:
    new = torch.zeros(rows, *old.shape[1:], dtype=old.dtype, device=old.device)
    if std:
        new.normal_(std=std)
    new[:kept] = old[:kept]
    return new
