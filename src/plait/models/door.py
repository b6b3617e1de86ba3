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

    tokens: Tensor  # ids (S, T) or packed (1, n); or vectors (S, T, d), (1, n, d)
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
    tokens: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
    cache: Cache | None,
) -> Entry:
    """Dense if all rows are full, else packed; positions continue from the cache.

    Tokens are ids (B, T), which the layers see as ``layout.ids``, or vectors (B, T, d), of which they see no ids.
    """
    vectors = tokens.is_floating_point()
    if tokens.dim() != 2 + vectors:
        name, form = ("inputs_embeds", "batch, tokens, width") if vectors else ("input_ids", "batch, tokens")
        raise DataError(f"{name} has shape {tuple(tokens.shape)}; it must be ({form})")
    start = None if cache is None else cache.positions
    past = 0 if cache is None else cache.max_past
    if cu_seqlens is not None:
        if attention_mask is not None or tokens.shape[0] != 1:
            raise DataError(
                "cu_seqlens bounds the sequences of one row: input_ids (1, n) and no attention_mask"
            )
        return _packed_entry(tokens, cu_seqlens, max_len, cache, start, past)
    shape = (tokens.shape[0], tokens.shape[1])
    if cache is not None and cache.n_seq != shape[0]:
        raise DataError(f"input_ids has {shape[0]} rows but the cache {cache.n_seq} sequences")
    if attention_mask is not None:
        if tuple(attention_mask.shape) != shape:
            raise DataError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {shape}; they must be equal"
            )
        lengths = attention_mask.ne(0).sum(1).tolist()
        if any(n != shape[1] for n in lengths):
            kept = attention_mask.flatten().ne(0).nonzero()[:, 0]
            tokens = tokens.flatten(0, 1)[kept][None]
            layout = Layout.packed(
                _bounds(lengths),
                kept.shape[0],
                shape[1],
                start=start,
                max_past=past,
                device=tokens.device,
                ids=None if vectors else tokens,
            )
            return Entry(tokens, layout, lengths, shape, kept)
    ids = None if vectors else tokens
    layout = Layout.dense(*shape, start=start, max_past=past, device=tokens.device, ids=ids)
    return Entry(tokens, layout, [shape[1]] * shape[0], shape)


def _packed_entry(
    tokens: Tensor,
    cu_seqlens: Tensor,
    max_len: int | None,
    cache: Cache | None,
    start: Tensor | None,
    past: int,
) -> Entry:
    n = tokens.shape[1]
    lengths: list[int] = []
    if cache is not None or max_len is None:  # the caller's bound spares the host a look at the device
        bounds = cu_seqlens.tolist()
        lengths = [b - a for a, b in pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] != n or any(n < 0 for n in lengths):
            raise DataError(f"cu_seqlens must rise from 0 to the {n} tokens of input_ids; it is {bounds}")
        if cache is not None and cache.n_seq != len(lengths):
            raise DataError(
                f"cu_seqlens bounds {len(lengths)} sequences but the cache holds {cache.n_seq} sequences"
            )
    bound = max(lengths, default=0) if max_len is None else max_len
    layout = Layout.packed(
        cu_seqlens,
        n,
        bound,
        start=start,
        max_past=past,
        device=tokens.device,
        ids=None if tokens.is_floating_point() else tokens,
    )
    return Entry(tokens, layout, lengths, (1, n))


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
