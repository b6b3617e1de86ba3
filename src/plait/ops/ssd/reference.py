"""The plain recurrences of Mamba-2 and Mamba-3, one token after the other; the truth for every other backend.

Mamba-2 (arXiv 2405.21060):  S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,   y_t = S_t C_t + D x_t
Mamba-3 (arXiv 2603.15569):  S_t = exp(a_t) (S_{t-1} + dt_t (1 - lam_t) sum_r v_{t-1,r} k_{t-1,r}^T)
                                   + dt_t lam_t sum_r v_{t,r} k_{t,r}^T,   o_{t,r} = S_t q_{t,r} + D v_{t,r}

Packed sequences are walked as one row: at the first token of a document what is remembered becomes that
document's initial state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence; shapes as in `plait.ops.ssd.ssd`."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    dt = dt.to(kind)
    if dt_bias is not None:
        dt = dt + dt_bias.to(kind)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    dt = dt.clamp(min=dt_limit[0], max=None if math.isinf(dt_limit[1]) else dt_limit[1])
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, width = x.shape[2:]
    per_group = heads // B.shape[2]
    keys, queries = (t.to(kind).repeat_interleave(per_group, 2) for t in (B, C))
    values = x.to(kind)
    decay = torch.exp(dt * A.to(kind))
    if initial_state is None:
        initial_state = values.new_zeros(n_seq, heads, width, B.shape[3])
    initial = initial_state.to(kind)
    state = _begin(initial, cu_seqlens)
    ys, states = [], []
    for t in range(x.shape[1]):
        state = _enter(state, initial, cu_seqlens, t)
        new = dt[:, t, :, None, None] * values[:, t, :, :, None] * keys[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + new
        states.append(state)
        ys.append((state * queries[:, t, :, None, :]).sum(3))
    y = torch.stack(ys, 1) if ys else values
    if D is not None:
        y = y + values * (D.to(kind) if D.dim() == 2 else D.to(kind)[:, None])
    return y.to(x.dtype), _finals(states, initial, cu_seqlens)


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
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mamba-3's recurrence; shapes as in `plait.ops.ssd.trapezoidal_ssd`."""
    kind = torch.float64 if v.dtype == torch.float64 else torch.float32
    n_seq = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, width = v.shape[2:]
    rank, size = k.shape[2], k.shape[4]
    values, keys, queries, dt, lam = (t.to(kind) for t in (v, k, q, dt, lam))
    decay = torch.exp(log_decay.to(kind))
    by_rank = values.new_ones(rank, heads, width) if rank_in is None else rank_in.to(kind).transpose(0, 1)
    if initial_state is None:
        initial_state = (
            values.new_zeros(n_seq, heads, width, size),
            values.new_zeros(n_seq, rank, heads, size),
            values.new_zeros(n_seq, heads, width),
        )
    initials = [t.to(kind) for t in initial_state]
    state, last_k, last_v = (_begin(t, cu_seqlens) for t in initials)
    os: list[Tensor] = []
    history: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for t in range(v.shape[1]):
        state, last_k, last_v = (
            _enter(now, initial, cu_seqlens, t)
            for now, initial in zip((state, last_k, last_v), initials, strict=True)
        )
        old = torch.einsum("brhp,brhn->bhpn", by_rank * last_v.unsqueeze(1), last_k)
        last_k, last_v = keys[:, t], values[:, t]
        ranked = by_rank * last_v.unsqueeze(1)
        new = torch.einsum("brhp,brhn->bhpn", ranked, last_k)
        beta = decay[:, t] * dt[:, t] * (1 - lam[:, t])
        gamma = dt[:, t] * lam[:, t]
        state = (
            decay[:, t, :, None, None] * state + beta[..., None, None] * old + gamma[..., None, None] * new
        )
        o = torch.einsum("bhpn,brhn->brhp", state, queries[:, t])
        os.append(o if D is None else o + D.to(kind)[:, None] * ranked)
        for past, now in zip(history, (state, last_k, last_v), strict=True):
            past.append(now)
    o = torch.stack(os, 1) if os else values.new_zeros(*v.shape[:2], rank, heads, width)
    ssm, key, value = (
        _finals(past, initial, cu_seqlens) for past, initial in zip(history, initials, strict=True)
    )
    return o.to(v.dtype), (ssm, key, value)


def _begin(initial: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What is remembered before the first step: the rows' initial states; packed: anything."""
    return initial if cu_seqlens is None else initial.new_zeros(1, *initial.shape[1:])


def _enter(state: Tensor, initial: Tensor, cu_seqlens: Tensor | None, t: int) -> Tensor:
    """Packed: the initial state of the document that begins at token t, if one does."""
    if cu_seqlens is None:
        return state
    document = torch.searchsorted(cu_seqlens[1:], cu_seqlens.new_full((1,), t), right=True)
    begins = cu_seqlens.index_select(0, document) == t
    return torch.where(begins.view(-1, *(1,) * (state.dim() - 1)), initial.index_select(0, document), state)


def _finals(states: list[Tensor], initial: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state after each sequence's last token; the initial one of a sequence without tokens."""
    if not states:
        return initial.clone()
    if cu_seqlens is None:
        return states[-1]
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    last = torch.cat(states).index_select(0, (end - 1).clamp(min=0))
    return torch.where((end > begin).view(-1, *(1,) * (last.dim() - 1)), last, initial)
