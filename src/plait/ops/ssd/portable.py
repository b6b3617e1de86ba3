"""Mamba-2 and Mamba-3 by chunks in plain torch: the reduction of `reduction.py` with the engine of `engine.py`."""

from __future__ import annotations

from torch import Tensor

from plait.ops.chunks import Plan, plan_chunks
from plait.ops.ssd import reduction
from plait.ops.ssd.engine import chunk_scan
from plait.ops.ssd.resume import States

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
    plan = plan_chunks(x, _size(chunk_size, x, cu_seqlens, max_len), cu_seqlens, max_len)
    return reduction.ssd(
        _engine(plan),
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_state,
    )


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
    initial_state: States | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
    chunk_size: int = CHUNK_ROWS,
) -> tuple[Tensor, States]:
    """Mamba-3's recurrence, `chunk_size` rows (tokens times rank) a chunk; shapes as in `plait.ops.ssd`."""
    plan = plan_chunks(v, _size(chunk_size // k.shape[2], v, cu_seqlens, max_len), cu_seqlens, max_len)
    return reduction.trapezoidal_ssd(
        _engine(plan),
        v,
        k,
        q,
        log_decay,
        dt,
        lam,
        rank_in=rank_in,
        D=D,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _engine(plan: Plan) -> reduction.Scan:
    """The chunk engine on the sequences of `plan`."""

    def scan(
        v: Tensor,
        k: Tensor,
        q: Tensor,
        a: Tensor,
        w: Tensor,
        d: Tensor | None,
        skip: Tensor | None,
        ranks: Tensor | None,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows = v.unsqueeze(1) if ranks is None else v.unsqueeze(1) * ranks.transpose(0, 1)
        rows = rows.expand(-1, k.shape[1], -1, -1)
        by_head = skip is None or skip.dim() == 1
        y, final = chunk_scan(
            rows, k, q, a, w, plan, diagonal=d, skip=skip if by_head else None, initial=initial
        )
        if skip is not None and not by_head:
            y = y + rows * skip.to(a.dtype)
        return y.to(v.dtype), final

    return scan


def _size(wanted: int, x: Tensor, cu_seqlens: Tensor | None, max_len: int | None) -> int:
    """Tokens a chunk: not more than the longest sequence has."""
    longest = x.shape[1] if cu_seqlens is None or max_len is None else min(max_len, x.shape[1])
    return max(1, min(wanted, longest))
