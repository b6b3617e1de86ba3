"""The loss over batches as the trainer makes them: logits, labels and bytes of a validation set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from plait.data.batch import IGNORED, Batch
from plait.evaluation.score import Score
from plait.inference.decoding import evaluating
from plait.models.model import Model


@torch.no_grad()
def evaluate(model: Model, batches: Iterable[Batch], token_bytes: Tensor | None = None) -> Score:
    """The sums over all batches; bytes too if ``token_bytes`` (V,), the bytes of each id, is given.

    The model is in eval mode meanwhile; autocast is the caller's. Nothing is read back from the device before
    the end. Over several processes, add up the scores.
    """
    nats: list[Tensor] = []
    counts: list[Tensor] = []
    with evaluating(model):
        for given in batches:
            batch = given.to(model.device)
            out = model(**batch.inputs())
            assert out.loss_sum is not None and out.n_targets is not None
            n_bytes = torch.zeros((), dtype=torch.int64, device=model.device)
            if token_bytes is not None and batch.labels.shape == batch.input_ids.shape:
                token_bytes = token_bytes.to(model.device)
                n_bytes = token_bytes[batch.labels[is_target(batch, model)]].sum(dtype=torch.int64)
            nats.append(out.loss_sum.detach().float())
            counts.append(torch.stack([out.n_targets.to(torch.int64), n_bytes]))
    if not nats:
        return Score()
    n_targets, total_bytes = torch.stack(counts).sum(0).tolist()
    # each batch's sum as it is, added in Python's float64
    return Score(sum(torch.stack(nats).tolist()), n_targets, total_bytes)


def is_target(batch: Batch, model: Model) -> Tensor:
    """Which labels (B, T) the loss is over: for a causal model all but the first token of each sequence."""
    target = batch.labels != IGNORED
    if batch.attention_mask is not None:
        target = target & (batch.attention_mask != 0)
    if model.config.head.kind != "lm":
        return target
    if batch.attention_mask is not None:
        first = (batch.attention_mask != 0).cumsum(1) == 1
    else:
        first = torch.zeros_like(target)
        if batch.cu_seqlens is None:
            first[:, :1] = True
        else:
            filled = batch.cu_seqlens[1:] > batch.cu_seqlens[:-1]
            first[0, batch.cu_seqlens[:-1][filled].long()] = True
    return target & ~first
