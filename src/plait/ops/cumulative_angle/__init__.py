"""Running sum of rotation steps, kept as an angle in [0, 2 pi): the rotary phase of Mamba-3 (arXiv 2603.15569)."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_dims, check_packing, check_shape
from plait.ops.dispatch import Op, choose

CUMULATIVE_ANGLE = Op(
    "cumulative_angle",
    {
        "gpu": "plait.ops.cumulative_angle.gpu:cumulative_angle",
        "cpu": "plait.ops.cumulative_angle.cpu:cumulative_angle",
        "portable": "plait.ops.cumulative_angle.portable:cumulative_angle",
        "reference": "plait.ops.cumulative_angle.reference:cumulative_angle",
    },
    dict.fromkeys(("gpu", "cpu"), (torch.float32, torch.bfloat16, torch.float16)),
)


def cumulative_angle(
    step: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """theta_t = (theta_{t-1} + step_t) mod 2 pi, in radians; the gradient is that of the plain sum.

    step (S, T, H, Ra), initial_state (S, H, Ra), None for zeros. Packed: one row (1, n, H, Ra) with cu_seqlens (S+1,)
    and max_len, a host bound of the lengths. Returns theta like step and the angle after each sequence's last token
    (S, H, Ra), both float32 (float64 for float64 steps), in [0, 2 pi); a sequence without tokens keeps its initial
    angle as given. Raises ValueError for shapes that do not fit, BackendError for a backend that cannot run.
    """
    check_dims("cumulative_angle", "step", step, "S, T, H, Ra")
    n_seq = check_packing("cumulative_angle", step, cu_seqlens, max_len)
    check_shape("cumulative_angle", "initial_state", initial_state, "S, H, Ra", n_seq, *step.shape[2:])
    run = choose(CUMULATIVE_ANGLE, backend, step.device, step.dtype)
    return run(step, initial_state=initial_state, cu_seqlens=cu_seqlens, max_len=max_len)
