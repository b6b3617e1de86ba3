"""Mamba-2 and Mamba-3 reduced to one recurrence, which an engine computes: `Scan`, in chunks or in Numba kernels.

    S_t = exp(a_t) S_{t-1} + w_t sum_r u_{t,r} k_{t,r}^T,   u_{t,r} = v_t m_r
    y_{t,r} = (exp(a_t) S_{t-1} + d_t sum_s u_{t,s} k_{t,s}^T) q_{t,r} + D u_{t,r}

Mamba-2 is this with rank 1 and d = w. Mamba-3's state update uses the token's own key with weight gamma_t =
dt_t lam_t and, one token later, once more with weight dt_{t+1} (1 - lam_{t+1}) under the same decay. So the key may
enter once with the sum w of both weights, as long as the token itself reads only the gamma part, d. The last token
of a sequence has no next one. (arXiv 2603.15569)
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from plait.ops.chunks import compute_dtype, no_autocast, token_map
from plait.ops.ssd.resume import States, finished, given_or_zeros, resumed


class Scan(Protocol):
    """An engine, bound to where the sequences of the row of n tokens lie."""

    def __call__(
        self,
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
        """v (n, H, P); k, q (n, R, G, N); a <= 0, w, d (n, H), d None for w; skip D (H) or (H, P); ranks m (H, R, P).

        initial (S, H, P, N), None for zeros. Returns y (n, R, H, P) in v's dtype and the final states.
        """


def ssd(
    scan: Scan,
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
) -> tuple[Tensor, Tensor]:
    """Mamba-2 by an engine; shapes as in `plait.ops.ssd.ssd`."""
    with no_autocast(x):
        kind = compute_dtype(x)
        dt = dt.to(kind)
        if dt_bias is not None:
            dt = dt + dt_bias.to(kind)
        if dt_softplus:
            dt = torch.nn.functional.softplus(dt)
        low, high = dt_limit
        if low > 0 or not dt_softplus or not math.isinf(high):
            dt = dt.clamp(min=low, max=None if math.isinf(high) else high)
        y, final = scan(
            x.flatten(0, 1),
            B.flatten(0, 1).unsqueeze(1),
            C.flatten(0, 1).unsqueeze(1),
            (dt * A.to(kind)).flatten(0, 1),
            dt.flatten(0, 1),
            None,
            D,
            None,
            initial_state,
        )
        return y.view_as(x), final


def trapezoidal_ssd(
    scan: Scan,
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
) -> tuple[Tensor, States]:
    """Mamba-3 by an engine; shapes as in `plait.ops.ssd.trapezoidal_ssd`."""
    with no_autocast(v):
        kind, rank = compute_dtype(v), k.shape[2]
        (n_row, length), (heads, width) = v.shape[:2], v.shape[2:]
        n_seq = n_row if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial = given_or_zeros(initial_state, v, k, n_seq)
        if n_row * length == 0 or n_seq == 0:
            ssm, last_k, last_v = initial
            o = v.unsqueeze(2).expand(-1, -1, rank, -1, -1).clone()
            return o, (ssm.clone(), last_k.clone(), last_v.clone())

        gamma, beta = dt.to(kind) * lam.to(kind), dt.to(kind) * (1 - lam.to(kind))
        following = torch.nn.functional.pad(beta[:, 1:], (0, 0, 0, 1))
        if cu_seqlens is not None:
            _, position = token_map(cu_seqlens, length)
            # the next token of the row may be another document's first
            following = following.masked_fill((position.roll(-1) == 0).unsqueeze(1), 0)
        o, final = scan(
            v.flatten(0, 1),
            k.flatten(0, 1),
            q.flatten(0, 1),
            log_decay.to(kind).flatten(0, 1),
            (gamma + following).flatten(0, 1),
            gamma.flatten(0, 1),
            D,
            None if rank_in is None else rank_in.to(kind),
            None if initial_state is None else resumed(initial, dt, lam, rank_in, cu_seqlens),
        )
        return o.view(n_row, length, rank, heads, width), finished(final, v, k, initial, cu_seqlens)
