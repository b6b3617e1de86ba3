"""The gated RMS norm of Mamba-2 and Mamba-3: an RMS norm over groups of channels, times silu of a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_shape
from plait.ops.dispatch import Op, choose

GATED_NORM = Op(
    "gated_norm",
    {
        "gpu": "plait.ops.gated_norm.gpu:gated_norm",
        "cpu": "plait.ops.gated_norm.cpu:gated_norm",
        "portable": "plait.ops.gated_norm.portable:gated_norm",
        "reference": "plait.ops.gated_norm.reference:gated_norm",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)},
)


def gated_norm(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """RMS(x * silu(z)) * weight, or RMS(x) * weight * silu(z) if `norm_before_gate` (arXiv 2405.21060, section 7).

    x, z (..., E) with E >= 1; weight (E), None for ones; z None: no gate. The root mean square is taken over each
    `group_size` neighbouring channels (None: all E), in float32 (float64 for float64 x). Returns y in x's shape and in
    ``dtype`` (None: x's). Raises ValueError for shapes that do not fit, BackendError for a backend that cannot run.
    """
    op = "gated_norm"
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., E) with E >= 1")
    channels = x.shape[-1]
    check_shape(op, "z", z, "..., E", *x.shape)
    check_shape(op, "weight", weight, "E", channels)
    if group_size is not None and (group_size < 1 or channels % group_size):
        raise ValueError(f"{op}: group_size is {group_size}, expected a divisor of the {channels} channels")
    return choose(GATED_NORM, backend, x.device, x.dtype)(
        x, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate, dtype=dtype
    )
