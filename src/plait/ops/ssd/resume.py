"""Where Mamba-3's recurrence begins and ends: its state between calls is S and the last token's key and value.

The last token of a call gives its key once more to the next token (arXiv 2603.15569), so what a sequence resumes from
is S + dt_0 (1 - lam_0) sum_r v_{-1,r} k_{-1,r}^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.chunks import compute_dtype

States = tuple[Tensor, Tensor, Tensor]


def resumed(
    initial: States, dt: Tensor, lam: Tensor, rank_in: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The state (S, H, P, N) that enters each sequence; shapes as in `plait.ops.ssd.trapezoidal_ssd`, n > 0."""
    ssm, last_k, last_v = initial
    beta = dt.to(ssm.dtype) * (1 - lam.to(ssm.dtype))
    if cu_seqlens is None:
        first = beta[:, 0]
    else:
        begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        first = (
            beta[0].index_select(0, begin.clamp(max=dt.shape[1] - 1)).masked_fill((end <= begin)[:, None], 0)
        )
    rows = last_v.unsqueeze(1)
    if rank_in is not None:
        rows = rows * rank_in.to(ssm.dtype).transpose(0, 1)
    pair = torch.einsum("srhp,srhn->shpn", rows.expand(-1, last_k.shape[1], -1, -1), last_k)
    return ssm + first[:, :, None, None] * pair


def finished(final: Tensor, v: Tensor, k: Tensor, initial: States, cu_seqlens: Tensor | None) -> States:
    """The states after each sequence's last token, those given for a sequence without tokens."""
    kind = compute_dtype(v)
    if cu_seqlens is None:
        return final, k[:, -1].to(kind), v[:, -1].to(kind)
    ssm, last_k, last_v = initial
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    filled, at = end > begin, (end - 1).clamp(min=0)
    final = torch.where(filled[:, None, None, None], final, ssm)
    key = torch.where(filled[:, None, None, None], k[0].index_select(0, at).to(kind), last_k)
    value = torch.where(filled[:, None, None], v[0].index_select(0, at).to(kind), last_v)
    return final, key, value


def given_or_zeros(initial: States | None, v: Tensor, k: Tensor, n_seq: int) -> States:
    """The initial states in the dtype that states have."""
    kind = compute_dtype(v)
    if initial is not None:
        ssm, last_k, last_v = initial
        return ssm.to(kind), last_k.to(kind), last_v.to(kind)
    (heads, width), (rank, size) = v.shape[2:], (k.shape[2], k.shape[4])
    return (
        v.new_zeros(n_seq, heads, width, size, dtype=kind),
        v.new_zeros(n_seq, rank, heads, size, dtype=kind),
        v.new_zeros(n_seq, heads, width, dtype=kind),
    )
