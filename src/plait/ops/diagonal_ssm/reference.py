"""A time-invariant diagonal state-space model as the plain recurrence: the truth for the other backends.

    h_t[e,n] = exp(dA[e,n]) h_{t-1}[e,n] + B[e,n] x_t[e];   y_t[e] = sum_n C[e,n] h_t[e,n] + D[e] x_t[e]
Complex parameters stand for conjugate pairs: y_t = 2 Re(sum_n C h) + D x. Source: S4D, arXiv 2206.11893, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_ssm(
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x (S, T, E), dA, B, C (E, N), D (E) -> y (S, T, E), final state (S, E, N), or (S, E, N, 2) if complex.

    Packed: one row (1, n, E) and cu_seqlens (S+1,); `max_len` is not needed here.
    """
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = (
            {torch.float32: torch.complex64, torch.float64: torch.complex128}[kind]
            if dA.is_complex()
            else kind
        )
        decay, B, C = torch.exp(dA.to(wide)), B.to(wide), C.to(wide)
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if initial_state is None:
            state = x.new_zeros(count, *dA.shape, dtype=wide)
        elif dA.is_complex():
            state = torch.view_as_complex(initial_state.to(kind).contiguous())
        else:
            state = initial_state.to(kind)
        xs = x.to(kind)
        if cu_seqlens is None:
            y, final = _recurrence(xs, decay, B, C, state)
        else:
            ys, finals = [], []
            bounds = cu_seqlens.tolist()
            for i in range(count):
                begin, end = bounds[i], bounds[i + 1]
                y, final = _recurrence(xs[:, begin:end], decay, B, C, state[i : i + 1])
                ys.append(y)
                finals.append(final)
            y = torch.cat(ys, 1) if ys else xs[:, :0]
            final = torch.cat(finals) if finals else state
        if D is not None:
            y = y + D.to(kind) * xs
        return y.to(x.dtype), torch.view_as_real(final) if final.is_complex() else final


def _recurrence(x: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x (S, T, E), decay, B, C (E, N), state (S, E, N) -> y (S, T, E) and the last state."""
    ys = []
    for x_t in x.unbind(1):
        state = decay * state + B * x_t.unsqueeze(-1)
        read = (C * state).sum(-1)
        ys.append(2 * read.real if read.is_complex() else read)
    return torch.stack(ys, 1) if ys else torch.zeros_like(x), state.clone()
