"""Softmax attention over (S, T, H, P), dense, packed or over a cache (arXiv 1706.03762, equation 1).

Heads are grouped: query head h reads key head h // (H / Hk). A query at position t sees positions in
(t - window, t], or, when not causal, (t - window, t + window).
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.chunks import autocast_dtype
from plait.ops.dispatch import Op, choose

ATTENTION = Op(
    "attention",
    {
        "gpu": "plait.ops.attention.gpu:attention",
        "portable": "plait.ops.attention.portable:attention",
        "reference": "plait.ops.attention.reference:attention",
    },
    {"gpu": (torch.bfloat16, torch.float16)},
)
CACHED_ATTENTION = Op(
    "cached_attention",
    {
        "portable": "plait.ops.attention.portable:cached_attention",
        "reference": "plait.ops.attention.reference:cached_attention",
    },
)


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
    backend: str | None = None,
) -> Tensor:
    """Attention of sequences to themselves: q (S, T, H, P), k and v (S, T, Hk, P) -> (S, T, H, P).

    Packed: one row (1, n, ...) whose sequences ``cu_seqlens`` (S+1) bounds. ``scale`` defaults to P ** -0.5.
    """
    _check(q, k, v)
    run = choose(ATTENTION, backend, q.device, autocast_dtype(q))
    return run(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        cu_seqlens=cu_seqlens,
        max_len=max_len,
        dropout=dropout,
    )


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
    backend: str | None = None,
) -> Tensor:
    """Causal attention of q (S, T, H, P) at ``positions`` (S, T) to buffers k, v (S, R, Hk, P).

    The buffers hold the last R of ``total`` (S,) tokens, the queries' own among them; position p is in slot
    p mod R. Only the first ``max_keys`` slots are read: a host bound of ``total``. A query that sees nothing (a
    pad) gives finite numbers that mean nothing.
    """
    _check(q, k, v)
    run = choose(CACHED_ATTENTION, backend, q.device)
    return run(q, k, v, positions, total, window=window, scale=scale, max_keys=max_keys)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (
        k.shape != v.shape
        or q.dim() != 4
        or k.dim() != 4
        or q.shape[3] != k.shape[3]
        or q.shape[2] % k.shape[2]
    ):
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (S, T, H, P) and "
            "twice (S, T, Hk, P) with H a multiple of Hk"
        )
