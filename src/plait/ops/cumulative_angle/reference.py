"""The running angle, one token after the other; the truth for every other backend.

Packed sequences are walked as one row: at the first token of a document the angle becomes the document's initial one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cumulative_angle(
    step: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None, max_len: int | None
) -> tuple[Tensor, Tensor]:
    """theta_t = (theta_{t-1} + step_t) mod 2 pi; shapes as in `plait.ops.cumulative_angle.cumulative_angle`."""
    kind = torch.float64 if step.dtype == torch.float64 else torch.float32
    n_seq = step.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = step.new_zeros(n_seq, *step.shape[2:], dtype=kind)
    initial = initial_state.to(kind)
    angle = initial if cu_seqlens is None else initial.new_zeros(1, *initial.shape[1:])
    angles = []
    for t in range(step.shape[1]):
        if cu_seqlens is not None:
            document = torch.searchsorted(cu_seqlens[1:], cu_seqlens.new_full((1,), t), right=True)
            begins = cu_seqlens.index_select(0, document) == t
            angle = torch.where(begins[:, None, None], initial.index_select(0, document), angle)
        angle = torch.remainder(angle + step[:, t].to(kind), 2 * math.pi)
        # A sum just below a full turn may round up to it.
        angle = torch.where(angle < 2 * math.pi, angle, angle - 2 * math.pi)
        angles.append(angle)
    if not angles:
        return step.to(kind), initial.clone()
    if cu_seqlens is None:
        return torch.stack(angles, 1), angle
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    last = torch.cat(angles).index_select(0, (end - 1).clamp(min=0))
    return torch.stack(angles, 1), torch.where((end > begin)[:, None, None], last, initial)
