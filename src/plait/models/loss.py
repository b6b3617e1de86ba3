"""Losses. The shift of labels happens here and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.mixers.layout import Layout

IGNORE = -100


def next_token_targets(labels: Tensor, layout: Layout) -> Tensor:
    """Labels (S, T) or (1, n), unshifted ids, to the targets of a causal model: the next token of the same sequence.

    The last token of each sequence predicts nothing (-100): no document predicts the beginning of another.
    """
    targets = torch.full_like(labels, IGNORE)
    if labels.shape[1] < 2:
        return targets
    targets[:, :-1] = labels[:, 1:]
    if layout.seq_index is not None:
        same = layout.seq_index[1:] == layout.seq_index[:-1]
        targets[:, :-1] = targets[:, :-1].masked_fill(~same, IGNORE)
    return targets


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over targets that are not -100, in nats, and their number; logits (..., V), targets (...)."""
    loss = F.cross_entropy(
        logits.flatten(0, -2).float() if logits.dtype != torch.float64 else logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    return loss, (targets != IGNORE).sum()
