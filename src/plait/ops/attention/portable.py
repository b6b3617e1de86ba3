"""Attention through torch's scaled_dot_product_attention; no (T, T) mask is ever built.

Dense sequences are one call; a window is a loop over blocks of queries, each with the keys it can see;
packed sequences are a loop over documents, or padded side by side when traced, so that a new packing needs no
new graph; a cache is read with masks of one block of queries.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.chunks import token_map

_QUERY_BLOCK = 256  # queries a mask covers
_LENGTH_STEP = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """q (S, T, H, P), k and v (S, T, Hk, P), or packed (1, n, ...) with cu_seqlens -> (S, T, H, P)."""
    if cu_seqlens is None:
        return _dense(q, k, v, causal, window, scale, dropout)
    if torch.compiler.is_compiling():
        longest = q.shape[1] if max_len is None else max_len
        return _padded(q, k, v, cu_seqlens, longest, causal, window, scale, dropout)
    return _documents(q, k, v, cu_seqlens, causal, window, scale, dropout)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    total: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    max_keys: int | None = None,
) -> Tensor:
    """q (S, T, H, P) at ``positions`` (S, T) over ring buffers k, v (S, R, Hk, P) that hold ``total`` (S,) tokens."""
    size = k.shape[1]
    keys = size if max_keys is None else min(size, max_keys)
    slot = torch.arange(keys, device=q.device)
    last = (total - 1)[:, None]
    held = last - torch.remainder(last - slot, size)  # (S, keys): the position whose key the slot holds
    k, v = k[:, :keys].to(q.dtype), v[:, :keys].to(q.dtype)
    blocks = []
    for a in range(0, q.shape[1], _QUERY_BLOCK):
        at = positions[:, a : a + _QUERY_BLOCK, None]
        seen = (held[:, None] >= 0) & (held[:, None] <= at)
        if window is not None:
            seen = seen & (held[:, None] > at - window)
        # a pad query sees nothing; one key keeps its softmax finite, and its row is dropped by the caller
        seen = seen | (~seen.any(-1, keepdim=True) & (slot == 0))
        blocks.append(_sdpa(q[:, a : a + _QUERY_BLOCK], k, v, seen[:, None], False, scale, 0.0))
    return torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0] if blocks else torch.zeros_like(q)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """``lengths`` (S, 1, 1, 1): keys beyond them are pads."""
    length = q.shape[1]
    if length == 0 or q.shape[0] == 0:
        return q + 0 * (k.sum() + v.sum())  # nothing to attend to, but the graph stays whole
    if window is None or window >= length:
        mask = None if lengths is None else torch.arange(length, device=q.device) < lengths.clamp(min=1)
        return _sdpa(q, k, v, mask, causal, scale, dropout)
    blocks = []
    for a in range(0, length, _QUERY_BLOCK):
        b = min(a + _QUERY_BLOCK, length)
        first = max(0, a - window + 1)
        last = b if causal else min(length, b + window - 1)
        apart = torch.arange(a, b, device=q.device)[:, None] - torch.arange(first, last, device=q.device)
        seen = (apart < window) & (apart >= 0 if causal else apart > -window)
        if lengths is not None:  # a pad query keeps its own pad key, so that its softmax stays finite
            seen = seen & (torch.arange(first, last, device=q.device) < lengths) | (apart == 0)
        blocks.append(_sdpa(q[:, a:b], k[:, first:last], v[:, first:last], seen, False, scale, dropout))
    return torch.cat(blocks, 1)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    bounds = cu_seqlens.tolist()
    sizes = [b - a for a, b in pairwise(bounds)]
    # split once: slicing in the loop would give every document a gradient as long as the row
    pieces = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
    out = [_document(a, b, c, causal, window, scale, dropout) for a, b, c in pieces if a.shape[1]]
    return torch.cat(out, 1) if out else torch.zeros_like(q)


def _document(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None, dropout: float
) -> Tensor:
    """One document (1, t, H, P); in bfloat16 on a CPU padded to a length that others have too.

    There oneDNN compiles kernels for every new length and keeps them: gigabytes, in a run over many documents.
    """
    length = q.shape[1]
    missing = -length % _LENGTH_STEP if q.dtype == torch.bfloat16 and q.device.type == "cpu" else 0
    if not missing or not causal:
        return _dense(q, k, v, causal, window, scale, dropout)
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (q, k, v))
    return _dense(q, k, v, causal, window, scale, dropout)[:, :length]  # no token looks at the pads after it


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """The traced form: documents side by side, padded on the right, so that no shape depends on the packing."""
    row, place = token_map(cu_seqlens, q.shape[1])
    shape = (cu_seqlens.shape[0] - 1, max_len)
    q, k, v = (t.new_zeros(*shape, *t.shape[2:]).index_put((row, place), t[0]) for t in (q, k, v))
    # pads stand after every token, where a causal query does not look
    lengths = None if causal else (cu_seqlens[1:] - cu_seqlens[:-1])[:, None, None, None]
    return _dense(q, k, v, causal, window, scale, dropout, lengths)[row, place][None]
