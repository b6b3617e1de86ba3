"""Mamba-2 and Mamba-3 by chunks in plain torch: both are reduced to the one engine of `engine.py`.

Mamba-3's state update uses the token's own key with weight gamma_t = dt_t lam_t and, one token later, once more
with weight dt_{t+1} (1 - lam_{t+1}) under the same decay. So the key may enter once with the sum of both weights,
as long as the token itself reads only the gamma part: a strict mask off the diagonal, gamma on it. The last token of
a sequence has no next one. (arXiv 2603.15569)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.ops.chunks import compute_dtype, no_autocast, plan_chunks, token_map
from plait.ops.ssd.engine import chunk_scan
from plait.ops.ssd.resume import finished, given_or_zeros, resumed

CHUNK_ROWS = 64


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
    chunk_size: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence in chunks of `chunk_size` tokens; shapes as in `plait.ops.ssd.ssd`."""
    with no_autocast(x):
        kind = compute_dtype(x)
        dt = dt.to(kind)
        if dt_bias is not None:
            dt = dt + dt_bias.to(kind)
        if dt_softplus:
            dt = torch.nn.functional.softplus(dt)
        dt = dt.clamp(min=dt_limit[0], max=None if math.isinf(dt_limit[1]) else dt_limit[1])
        plan = plan_chunks(x, _size(chunk_size, x, cu_seqlens, max_len), cu_seqlens, max_len)
        by_head = D is not None and D.dim() == 1
        y, final = chunk_scan(
            x.flatten(0, 1).unsqueeze(1),
            B.flatten(0, 1).unsqueeze(1),
            C.flatten(0, 1).unsqueeze(1),
            (dt * A.to(kind)).flatten(0, 1),
            dt.flatten(0, 1),
            plan,
            skip=D if by_head else None,
            initial=initial_state,
        )
        y = y.view_as(x)
        if D is not None and not by_head:
            y = (y + x * D.to(kind)).to(x.dtype)
        return y, final


def trapezoidal_ssd(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    lam: Tensor,
    *,
    rank_in: Tensor | None,
    D: Tensor | None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
    chunk_size: int = CHUNK_ROWS,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mamba-3's recurrence, `chunk_size` rows (tokens times rank) a chunk; shapes as in `plait.ops.ssd`."""
    with no_autocast(v):
        kind = compute_dtype(v)
        rank = k.shape[2]
        (n_row, length), (heads, width) = v.shape[:2], v.shape[2:]
        n_seq = n_row if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial = given_or_zeros(initial_state, v, k, n_seq)
        if n_row * length == 0 or n_seq == 0:
            ssm, last_k, last_v = initial
            o = v.unsqueeze(2).expand(-1, -1, rank, -1, -1).clone()
            return o, (ssm.clone(), last_k.clone(), last_v.clone())

        ranks = None if rank_in is None else rank_in.to(kind).transpose(0, 1)
        gamma, beta = dt.to(kind) * lam.to(kind), dt.to(kind) * (1 - lam.to(kind))
        following = torch.nn.functional.pad(beta[:, 1:], (0, 0, 0, 1))
        if cu_seqlens is not None:
            _, position = token_map(cu_seqlens, length)
            # the next token of the row may be another document's first
            following = following.masked_fill((position.roll(-1) == 0).unsqueeze(1), 0)
        plan = plan_chunks(v, _size(chunk_size // rank, v, cu_seqlens, max_len), cu_seqlens, max_len)
        rows = v.unsqueeze(2) if ranks is None else v.unsqueeze(2) * ranks
        o, final = chunk_scan(
            rows.expand(-1, -1, rank, -1, -1).flatten(0, 1),
            k.flatten(0, 1),
            q.flatten(0, 1),
            log_decay.to(kind).flatten(0, 1),
            (gamma + following).flatten(0, 1),
            plan,
            diagonal=gamma.flatten(0, 1),
            skip=D,
            initial=resumed(initial, dt, lam, rank_in, cu_seqlens),
        )
        o = o.to(v.dtype).view(n_row, length, rank, heads, width)
        return o, finished(final, v, k, initial, cu_seqlens)


def _size(wanted: int, x: Tensor, cu_seqlens: Tensor | None, max_len: int | None) -> int:
    """Tokens a chunk: not more than the longest sequence has."""
    longest = x.shape[1] if cu_seqlens is None or max_len is None else min(max_len, x.shape[1])
    return max(1, min(wanted, longest))
