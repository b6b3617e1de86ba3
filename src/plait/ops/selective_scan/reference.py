"""Mamba-1's selective scan as the plain recurrence: the truth the other backends are judged by.

    h_t[e,n] = exp(dt_t[e] A[e,n]) h_{t-1}[e,n] + dt_t[e] x_t[e] B_t[n];   y_t[e] = sum_n h_t[e,n] C_t[n] + D[e] x_t[e]
    y_t *= silu(z_t) if there is a gate
Source: arXiv 2312.00752, equation 2 with the zero-order hold on A and Euler's rule on B (algorithm 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x, dt, z (S, T, E), A (E, N), B, C (S, T, N) or (S, T, G, N) -> y (S, T, E), final state (S, E, N).

    Packed: one row (1, n, ...) and cu_seqlens (S+1,); `max_len` is not needed here. Channel e reads group
    e // (E / G) of B and C.
    """
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels, states = A.shape
        A = A.to(kind)
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if initial_state is None:
            initial_state = x.new_zeros(count, channels, states, dtype=kind)
        xs = x.to(kind)
        delta = dt.to(kind)
        if dt_bias is not None:
            delta = delta + dt_bias.to(kind)
        if dt_softplus:
            delta = functional.softplus(delta)
        Bs, Cs = _per_channel(B.to(kind), channels), _per_channel(C.to(kind), channels)
        if cu_seqlens is None:
            y, final = _recurrence(xs, delta, A, Bs, Cs, initial_state.to(kind))
        else:
            ys, finals = [], []
            bounds = cu_seqlens.tolist()
            for i in range(count):
                begin, end = bounds[i], bounds[i + 1]
                part = slice(begin, end)
                y, final = _recurrence(
                    xs[:, part],
                    delta[:, part],
                    A,
                    Bs[:, part],
                    Cs[:, part],
                    initial_state[i : i + 1].to(kind),
                )
                ys.append(y)
                finals.append(final)
            y = torch.cat(ys, 1) if ys else xs[:, :0]
            final = torch.cat(finals) if finals else initial_state.to(kind)
        if D is not None:
            y = y + D.to(kind) * xs
        if z is not None:
            y = y * functional.silu(z.to(kind))
        return y.to(x.dtype), final


def _recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """x, dt (S, T, E), A (E, N), B, C (S, T, E or 1, N), state (S, E, N) -> y (S, T, E) and the last state."""
    ys = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(dt_t.unsqueeze(-1) * A)
        state = decay * state + (dt_t * x_t).unsqueeze(-1) * B_t
        ys.append((state * C_t).sum(-1))
    return torch.stack(ys, 1) if ys else torch.zeros_like(x), state.clone()


def _per_channel(B: Tensor, channels: int) -> Tensor:
    """(S, T, N) to (S, T, 1, N), and (S, T, G, N) to (S, T, E, N)."""
    if B.dim() == 3:
        return B.unsqueeze(2)
    return B.repeat_interleave(channels // B.shape[2], 2)
