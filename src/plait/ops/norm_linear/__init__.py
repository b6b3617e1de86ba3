"""A linear map of a few rows, with the RMS norm before it and the residual after it: most of what decoding reads.

R rows, D channels in, O out. One kernel reads the weights once; the norm's factor is taken from x on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_dims, check_no_gradient, check_shape
from plait.ops.dispatch import Op, choose

NORM_LINEAR = Op(
    "norm_linear",
    {
        "gpu": "plait.ops.norm_linear.gpu:norm_linear",
        "cpu": "plait.ops.norm_linear.cpu:norm_linear",
        "portable": "plait.ops.norm_linear.portable:norm_linear",
        "reference": "plait.ops.norm_linear.reference:norm_linear",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)},
)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + RMS(x) * norm_weight @ weight^T + bias for decoding; eps None: no norm, norm_weight None: ones.

    x (R, D); weight (O, D) of x's dtype; bias (O); norm_weight (D); residual (R, O). The root mean square is taken over
    each `group_size` neighbouring channels (None: all D), in float32 (float64 for float64 x). Returns a new (R, O) in
    x's dtype, without a gradient. Raises ValueError for what does not fit or would need a gradient, BackendError for a
    backend that cannot run.
    """
    op = "norm_linear"
    check_dims(op, "x", x, "R, D")
    check_dims(op, "weight", weight, "O, D")
    (rows, channels), outputs = x.shape, weight.shape[0]
    check_shape(op, "weight", weight, "O, D", outputs, channels)
    check_shape(op, "bias", bias, "O", outputs)
    check_shape(op, "norm_weight", norm_weight, "D", channels)
    check_shape(op, "residual", residual, "R, O", rows, outputs)
    check_no_gradient(op, x, weight, bias, norm_weight, residual)
    if weight.dtype != x.dtype:
        raise ValueError(f"{op}: weight is {weight.dtype}, expected {x.dtype}, as x is")
    if eps is None and (norm_weight is not None or group_size is not None):
        raise ValueError(f"{op}: norm_weight and group_size are of the norm: give its eps too")
    if group_size is not None and (group_size < 1 or channels % group_size):
        raise ValueError(f"{op}: group_size is {group_size}, expected a divisor of the {channels} channels")
    return choose(NORM_LINEAR, backend, x.device, x.dtype)(
        x, weight, bias, norm_weight=norm_weight, eps=eps, group_size=group_size, residual=residual
    )
