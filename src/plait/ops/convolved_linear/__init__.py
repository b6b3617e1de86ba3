"""The way into a Mamba layer while decoding: norm, linear map, and the short convolution of some of its outputs.

R sequences of one token, D channels in, O out, C of them convolved, W taps. One kernel on a GPU, where a program that
makes an output has all it takes to convolve it, and a launch costs as much as the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_contiguous, check_dims, check_no_gradient, check_shape
from plait.ops.dispatch import Op, choose

CONVOLVED_LINEAR = Op(
    "convolved_linear",
    {
        "gpu": "plait.ops.convolved_linear.gpu:convolved_linear",
        "portable": "plait.ops.convolved_linear.portable:convolved_linear",
        "reference": "plait.ops.convolved_linear.reference:convolved_linear",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16)},
)


def convolved_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """norm_linear of x, then for its columns first .. first + C causal_conv1d_update with silu, in their place.

    x (R, D); weight (O, D) of x's dtype; bias (O); state (R, W-1, C), contiguous, changed in place; conv_weight (C, W);
    conv_bias (C); norm_weight, eps and group_size as in `norm_linear`. Returns a new (R, O) in x's dtype, without a
    gradient. Raises ValueError for what does not fit or would need a gradient, BackendError for a backend that cannot
    run.
    """
    op = "convolved_linear"
    check_dims(op, "x", x, "R, D")
    check_dims(op, "weight", weight, "O, D")
    check_dims(op, "conv_weight", conv_weight, "C, W")
    (rows, channels), outputs = x.shape, weight.shape[0]
    convolved, taps = conv_weight.shape[0], max(conv_weight.shape[1], 1)
    check_shape(op, "weight", weight, "O, D", outputs, channels)
    check_shape(op, "bias", bias, "O", outputs)
    check_shape(op, "conv_weight", conv_weight, "C, W", convolved, taps)
    check_shape(op, "conv_bias", conv_bias, "C", convolved)
    check_shape(op, "state", state, "R, W-1, C", rows, taps - 1, convolved)
    check_shape(op, "norm_weight", norm_weight, "D", channels)
    check_contiguous(op, "state", state)
    check_no_gradient(op, x, weight, bias, state, conv_weight, conv_bias, norm_weight)
    if first < 0 or first + convolved > outputs:
        raise ValueError(f"{op}: columns {first} to {first + convolved} are to be convolved, of {outputs}")
    if weight.dtype != x.dtype:
        raise ValueError(f"{op}: weight is {weight.dtype}, expected {x.dtype}, as x is")
    if eps is None and (norm_weight is not None or group_size is not None):
        raise ValueError(f"{op}: norm_weight and group_size are of the norm: give its eps too")
    if group_size is not None and (group_size < 1 or channels % group_size):
        raise ValueError(f"{op}: group_size is {group_size}, expected a divisor of the {channels} channels")
    return choose(CONVOLVED_LINEAR, backend, x.device, x.dtype)(
        x, weight, bias, first, state, conv_weight, conv_bias, norm_weight=norm_weight, eps=eps, group_size=group_size
    )  # fmt: skip
