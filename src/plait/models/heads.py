"""What stands on the last hidden states: token logits, or a label for each sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.config.schema import HeadConfig, NormConfig
from plait.mixers.layout import Layout
from plait.models.loss import cross_entropy
from plait.nn.linear import make_linear
from plait.nn.mlp import ACTIVATIONS
from plait.nn.norm import make_norm
from plait.nn.roles import EMBEDDING, VECTOR


class Unembedding(nn.Module):
    """Hidden states to logits over the vocabulary; the weight may be the embedding's."""

    roles = {"weight": EMBEDDING, "bias": VECTOR}  # noqa: RUF012

    def __init__(self, d_in: int, rows: int, *, bias: bool, tied: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, d_in)) if tied is None else cast("nn.Parameter", tied)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self.tied = tied is not None

    def reset_parameters(self, std: float) -> None:
        """Draw the weight from N(0, std) unless it is the embedding's; the bias is zero."""
        if not self.tied:
            nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., rows)."""
        return F.linear(x, self.weight, self.bias)


class LMHead(nn.Module):
    """Logits (..., vocab_size) from hidden states (..., d); rows that only pad the vocabulary are cut off."""

    def __init__(
        self, config: HeadConfig, d_in: int, vocab_size: int, rows: int, tied: Tensor | None, eps: float
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.softcap = config.softcap
        self.activation: Callable[[Tensor], Tensor] | None = ACTIVATIONS.get(config.transform)
        if self.activation is not None:  # BERT's prediction head
            self.transform = make_linear(d_in, d_in, bias=True)
            self.norm = make_norm(NormConfig(kind="layer", eps=eps), d_in)
        self.unembedding = Unembedding(d_in, rows, bias=config.bias, tied=tied)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., d) -> logits (..., vocab_size)."""
        if self.activation is not None:
            hidden = self.norm(self.activation(self.transform(hidden)))
        logits = self.unembedding(hidden)
        if logits.shape[-1] != self.vocab_size:
            logits = logits[..., : self.vocab_size]
        if self.softcap is not None:  # in float32: near the cap bfloat16 cannot tell neighbours apart
            logits = self.softcap * torch.tanh(logits.float() / self.softcap)
        return logits


class ClassificationHead(nn.Module):
    """One vector of labels for each sequence: pool, optionally dense + tanh, dropout, linear."""

    def __init__(self, config: HeadConfig, d_in: int) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.num_labels = config.num_labels
        self.pooler = make_linear(d_in, d_in, bias=True) if config.pooler else None
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = make_linear(d_in, config.num_labels, bias=True)

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        """hidden (S, T, d) or packed (1, n, d) -> (S, num_labels)."""
        x = pool(hidden, layout, self.pooling)
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        return self.classifier(self.dropout(x))

    def loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count over sequences: cross-entropy of class ids, or squared error when there is one label."""
        if self.num_labels > 1:
            return cross_entropy(logits, labels.reshape(logits.shape[:-1]))
        error = logits[:, 0].float() - labels.reshape(-1).float()
        return error.square().sum(), torch.tensor(error.numel(), device=error.device)


def pool(hidden: Tensor, layout: Layout, how: str) -> Tensor:
    """One vector a sequence, (S, d): its first or last token, or the mean or maximum over its tokens.

    A sequence without tokens gives zeros.
    """
    if layout.cu_seqlens is None or layout.seq_index is None:
        if hidden.shape[1] == 0:
            return hidden.new_zeros(hidden.shape[0], hidden.shape[2])
        if how in ("first", "last"):
            return hidden[:, 0 if how == "first" else -1]
        return hidden.mean(1) if how == "mean" else hidden.amax(1)
    tokens, cu = hidden[0], layout.cu_seqlens.to(torch.int64)
    filled = (cu[1:] > cu[:-1])[:, None]
    zeros = tokens.new_zeros(layout.n_seq, tokens.shape[-1])
    if how in ("first", "last"):
        place = cu[:-1] if how == "first" else cu[1:] - 1
        picked = tokens[place.clamp(0, max(0, tokens.shape[0] - 1))] if tokens.shape[0] else zeros
        return torch.where(filled, picked, zeros)
    if how == "mean":
        return zeros.index_add(0, layout.seq_index, tokens) / layout.lengths.clamp(min=1)[:, None]
    index = layout.seq_index[:, None].expand_as(tokens)
    return zeros.scatter_reduce(0, index, tokens, "amax", include_self=False)
