"""What a pre-norm block does twice: add a branch to the residual stream, and norm the sum for the next branch."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_shape
from plait.ops.dispatch import Op, choose

ADD_NORM = Op(
    "add_norm",
    {
        "gpu": "plait.ops.add_norm.gpu:add_norm",
        "cpu": "plait.ops.add_norm.cpu:add_norm",
        "portable": "plait.ops.add_norm.portable:add_norm",
        "reference": "plait.ops.add_norm.reference:add_norm",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)},
)


def add_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS(x + y) * weight and x + y, read and written once (RMS norm: arXiv 1910.07467, equation 4).

    x, y (..., E) with E >= 1; weight (E), None for ones. The sum has the wider dtype of x and y; its root mean square
    over the channels is taken in float32 (float64 for float64) from the sum as it is kept. ``dtype`` is that of the
    norm, None for the sum's. Raises ValueError for shapes that do not fit, BackendError for a backend that cannot run.
    """
    op = "add_norm"
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., E) with E >= 1")
    check_shape(op, "y", y, "..., E", *x.shape)
    check_shape(op, "weight", weight, "E", x.shape[-1])
    kind = torch.promote_types(x.dtype, y.dtype)
    return choose(ADD_NORM, backend, x.device, kind)(x, y, weight, eps=eps, dtype=dtype or kind)
