"""The running angle by chunks in plain torch: sums within the chunks, and a sum over the chunks' own angles.

Sums are float64 where the device has it: in float32 the sum of a few thousand steps has lost three digits of the
angle, which is all that is used of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.ops.chunks import compute_dtype, join, no_autocast, plan_chunks, split

CHUNK_TOKENS = 64


def cumulative_angle(
    step: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None, max_len: int | None
) -> tuple[Tensor, Tensor]:
    """theta_t = (theta_{t-1} + step_t) mod 2 pi; shapes as in `plait.ops.cumulative_angle.cumulative_angle`."""
    with no_autocast(step):
        kind = compute_dtype(step)
        wide = kind if step.device.type == "mps" else torch.float64
        plan = plan_chunks(step, CHUNK_TOKENS, cu_seqlens, max_len)
        if initial_state is None:
            initial_state = step.new_zeros(plan.n_seq, *step.shape[2:], dtype=kind)
        if plan.count == 0:
            return step.to(kind), initial_state.to(kind).clone()
        within = split(step.to(wide), plan).cumsum(1)
        # A chunk's total enters the sum over chunks as an angle, so that this sum stays small.
        total = torch.remainder(within[:, -1], 2 * math.pi)
        initial = initial_state.to(wide)
        if plan.chunk is None or plan.turn is None:
            total = total.unflatten(0, (plan.n_seq, plan.steps))
            before = (_exclusive_sum(total, 1) + initial.unsqueeze(1)).flatten(0, 1)
        else:
            sequence = plan.turn % plan.n_seq
            earlier = _exclusive_sum(total, 0)
            start = earlier.index_select(0, plan.chunk[0].index_select(0, sequence))
            before = earlier - start + initial.index_select(0, sequence)
        theta = torch.remainder(join(within + before.unsqueeze(1), plan), 2 * math.pi).to(kind)
        # An angle just below a full turn may round up to it.
        theta = torch.where(theta < 2 * math.pi, theta, theta - 2 * math.pi)
        if cu_seqlens is None:
            return theta, theta[:, -1]
        begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        last = theta[0].index_select(0, (end - 1).clamp(min=0))
        return theta, torch.where((end > begin)[:, None, None], last, initial_state.to(kind))


def _exclusive_sum(t: Tensor, dim: int) -> Tensor:
    """The sum of what stands before each element; taking it off an inclusive sum would let its rounding in."""
    return torch.cat(
        [torch.zeros_like(t.narrow(dim, 0, 1)), t.cumsum(dim).narrow(dim, 0, t.shape[dim] - 1)], dim
    )
