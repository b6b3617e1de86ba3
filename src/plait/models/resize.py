"""Changing the vocabulary of a built model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.models.heads import LMHead
from plait.nn.embedding import TokenTable

if TYPE_CHECKING:
    from plait.models.model import Model


@torch.no_grad()
def resize_vocabulary(model: Model, vocab_size: int) -> None:
    """Give the tables and the head ``vocab_size`` ids; kept ids keep their rows, new ones begin as the first did."""
    if vocab_size < 1:
        raise BuildError(f"vocab_size {vocab_size} is not allowed: a vocabulary has at least one id")
    if not model.config.head.project:
        raise BuildError("the logits are the last layer's own: build the model anew with another vocab_size")
    multiple = model.config.pad_vocab_size_multiple
    rows = -(-vocab_size // multiple) * multiple
    kept = min(vocab_size, model.vocab_size)
    for table in [module for module in model.modules() if isinstance(module, TokenTable)]:
        table.weight = _resized(table.weight, rows, kept, table.draw)
        table.num_embeddings = rows
    if isinstance(model.head, LMHead):
        unembedding = model.head.unembedding
        model.head.vocab_size = vocab_size
        if unembedding.tied:
            unembedding.weight = cast("nn.Parameter", model.embedding.tokens.weight)
        else:
            unembedding.weight = _resized(unembedding.weight, rows, kept, unembedding.draw)
        if unembedding.bias is not None:
            unembedding.bias = _resized(unembedding.bias, rows, kept, nn.init.zeros_)
    model.vocab_size = vocab_size
    model.config = model.config.model_copy(update={"vocab_size": vocab_size})


def _resized(old: Tensor, rows: int, kept: int, draw: Callable[[Tensor], object]) -> nn.Parameter:
    new = torch.empty(rows, *old.shape[1:], dtype=old.dtype, device=old.device)
    draw(new)
    new[:kept] = old[:kept]
    return nn.Parameter(new)
