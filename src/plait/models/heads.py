"""What stands on the last hidden states: token logits, or a label for each sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.config.errors import BuildError, DataError
from plait.config.schema import HeadConfig, NormConfig
from plait.mixers.layout import Layout
from plait.models.linear_loss import linear_cross_entropy, pays
from plait.models.loss import cross_entropy
from plait.nn.joined import joins, plain, project
from plait.nn.linear import make_linear
from plait.nn.mlp import ACTIVATIONS
from plait.nn.norm import make_norm
from plait.nn.roles import UNEMBEDDING, VECTOR

FEW = 64
"""Tokens that a step is given at most for its kernels to be worth it."""


class Unembedding(nn.Module):
    """Hidden states to logits over the vocabulary; the weight may be the embedding's."""

    roles = {"weight": UNEMBEDDING, "bias": VECTOR}  # noqa: RUF012

    def __init__(self, d_in: int, rows: int, *, bias: bool, tied: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, d_in)) if tied is None else cast("nn.Parameter", tied)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self.tied = tied is not None
        self.std = 0.02

    def reset_parameters(self, std: float) -> None:
        """Draw the weight from N(0, std) unless it is the embedding's; the bias is zero."""
        self.std = std
        if not self.tied:
            self.draw(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def draw(self, rows: Tensor) -> None:
        """Overwrite ``rows`` (n, d_in) with new ones."""
        nn.init.normal_(rows, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., rows)."""
        return F.linear(x, self.weight, self.bias)


class GivenLogits(Unembedding):
    """In the place of the output map where the last layer's outputs are the logits."""

    def __init__(self, d_in: int, rows: int) -> None:
        nn.Module.__init__(self)
        if d_in != rows:
            raise BuildError(
                f"head: project is false, but the last layer is {d_in} wide and the vocabulary has {rows} rows"
            )
        self.bias = None
        self.tied = False

    def reset_parameters(self, std: float) -> None:
        """There is nothing to draw."""

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x


class LMHead(nn.Module):
    """Logits (..., vocab_size) from hidden states (..., d).

    Rows that only pad the vocabulary are cut off, unless the config wants them: then logits are (..., rows).
    """

    def __init__(
        self, config: HeadConfig, d_in: int, vocab_size: int, rows: int, tied: Tensor | None, eps: float
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.padded = config.padded
        self.softcap = config.softcap
        self.projects = config.project
        self.activation: Callable[[Tensor], Tensor] | None = ACTIVATIONS.get(config.transform)
        if self.activation is not None:  # BERT's prediction head
            self.transform = make_linear(d_in, d_in, bias=True)
            self.norm = make_norm(NormConfig(kind="layer", eps=eps), d_in)
        self.unembedding = (
            Unembedding(d_in, rows, bias=config.bias, tied=tied)
            if config.project
            else GivenLogits(d_in, rows)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., d) -> logits (..., vocab_size), or (..., rows) if padding counts."""
        return self._capped(self.unembedding(self._transformed(hidden)))

    @torch.no_grad()
    def step(self, hidden: Tensor, norm: nn.Module) -> Tensor:
        """The same of norm(hidden), without a gradient; for a few tokens norm and map are one kernel."""
        last, few = self.unembedding, hidden.numel() <= FEW * hidden.shape[-1]
        joined = few and self.activation is None and plain(self, LMHead) and plain(last, Unembedding)
        if not joined or not joins(hidden, norm) or last.weight.dtype != hidden.dtype:
            return self(norm(hidden))
        rows = project(hidden.flatten(0, -2), last, norm)
        return self._capped(rows.view(*hidden.shape[:-1], rows.shape[1]))

    def _capped(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] != self.vocab_size and not self.padded:
            logits = logits[..., : self.vocab_size]
        if self.softcap is not None:  # in float32: near the cap bfloat16 cannot tell neighbours apart
            wide = logits if logits.dtype == torch.float64 else logits.float()
            logits = self.softcap * torch.tanh(wide / self.softcap)
        return logits

    def splits_loss(self, hidden: Tensor) -> bool:
        """Whether ``loss`` of hidden states (..., d) is better than the logits' cross-entropy: if they are many."""
        n_tokens = hidden.numel() // max(1, hidden.shape[-1])
        return self.projects and pays(n_tokens, self.vocab_size, hidden.device)

    def loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over targets (...), in nats, and their number, without the logits of all hidden states (..., d)."""
        weight: Tensor = self.unembedding.weight
        bias: Tensor | None = self.unembedding.bias
        if weight.shape[0] != self.vocab_size and not self.padded:
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        return linear_cross_entropy(self._transformed(hidden), weight, bias, targets, softcap=self.softcap)

    def _transformed(self, hidden: Tensor) -> Tensor:
        return hidden if self.activation is None else self.norm(self.activation(self.transform(hidden)))


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
        """Sum and count over sequences: cross-entropy of class ids, or squared error when there is one label.

        labels (S,) or (S, 1); DataError for any other shape.
        """
        n_seq = logits.shape[0]
        if labels.shape not in ((n_seq,), (n_seq, 1)):
            raise DataError(
                f"labels have shape {tuple(labels.shape)}; they must be ({n_seq},), one for each sequence"
            )
        labels = labels.reshape(n_seq)
        if self.num_labels > 1:
            return cross_entropy(logits, labels)
        error = logits[:, 0].float() - labels.float()
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
