"""The model's door: every form of input becomes token ids and a layout; a mixer never sees a pad."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from plait.config.errors import DataError
from plait.mixers.layout import Layout
from plait.models.cache import Cache


@dataclass(frozen=True)
class Entry:
    """What came in, without pads; ``kept`` are the flat places of the tokens of a padded input."""

    ids: Tensor  # (S, T) or packed (1, n)
    layout: Layout
    lengths: list[int]  # new tokens of each sequence, on the host
    shape: tuple[int, int]  # (B, T) of the input as given
    kept: Tensor | None = None

    def drop_pads(self, per_token: Tensor) -> Tensor:
        """(B, T, ...) as the caller gave it to the model's own form."""
        return per_token if self.kept is None else per_token.flatten(0, 1)[self.kept][None]

    def restore_pads(self, x: Tensor) -> Tensor:
        """(1, n, ...) back to (B, T, ...), zeros where pads were."""
        if self.kept is None:
            return x
        out = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return out.index_put((self.kept,), x[0]).unflatten(0, self.shape)


def enter(
    ids: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
    cache: Cache | None,
) -> Entry:
    """Dense if all rows are full, else packed; positions continue from the cache."""
    if ids.dim() != 2:
        raise DataError(f"input_ids has shape {tuple(ids.shape)}; it must be (batch, tokens)")
    start = None if cache is None else cache.positions
    past = 0 if cache is None else cache.max_past
    if cu_seqlens is not None:
        if attention_mask is not None or ids.shape[0] != 1:
            raise DataError(
                "cu_seqlens bounds the sequences of one row: input_ids (1, n) and no attention_mask"
            )
        return _packed_entry(ids, cu_seqlens, max_len, cache, start, past)
    shape = (ids.shape[0], ids.shape[1])
    if cache is not None and cache.n_seq != shape[0]:
        raise DataError(f"input_ids has {shape[0]} rows but the cache {cache.n_seq} sequences")
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise DataError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(ids.shape)}; "
                "they must be equal"
            )
        lengths = attention_mask.ne(0).sum(1).tolist()
        if any(n != shape[1] for n in lengths):
            kept = attention_mask.flatten().ne(0).nonzero()[:, 0]
            layout = Layout.packed(
                _bounds(lengths), kept.shape[0], shape[1], start=start, max_past=past, device=ids.device
            )
            return Entry(ids.flatten()[kept][None], layout, lengths, shape, kept)
    layout = Layout.dense(*shape, start=start, max_past=past, device=ids.device)
    return Entry(ids, layout, [shape[1]] * shape[0], shape)


def _packed_entry(
    ids: Tensor, cu_seqlens: Tensor, max_len: int | None, cache: Cache | None, start: Tensor | None, past: int
) -> Entry:
    lengths: list[int] = []
    if cache is not None or max_len is None:  # the caller's bound spares the host a look at the device
        bounds = cu_seqlens.tolist()
        lengths = [b - a for a, b in pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] != ids.shape[1] or any(n < 0 for n in lengths):
            raise DataError(
                f"cu_seqlens must rise from 0 to the {ids.shape[1]} tokens of input_ids; it is {bounds}"
            )
        if cache is not None and cache.n_seq != len(lengths):
            raise DataError(
                f"cu_seqlens bounds {len(lengths)} sequences but the cache holds {cache.n_seq} sequences"
            )
    bound = max(lengths, default=0) if max_len is None else max_len
    layout = Layout.packed(cu_seqlens, ids.shape[1], bound, start=start, max_past=past, device=ids.device)
    return Entry(ids, layout, lengths, (1, ids.shape[1]))


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
