"""One new token of the short causal convolution: its output, and the window of inputs moved on in place.

S sequences, C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_contiguous, check_dims, check_no_gradient, check_shape
from plait.ops.dispatch import Op, choose

CAUSAL_CONV1D_UPDATE = Op(
    "causal_conv1d_update",
    {
        "gpu": "plait.ops.causal_conv1d_update.gpu:causal_conv1d_update",
        "cpu": "plait.ops.causal_conv1d_update.cpu:causal_conv1d_update",
        "portable": "plait.ops.causal_conv1d_update.portable:causal_conv1d_update",
        "reference": "plait.ops.causal_conv1d_update.reference:causal_conv1d_update",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)},
)


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(bias + sum_j weight[:, j] [state, x]_j), act None or "silu"; then x enters `state` and its oldest leaves.

    x (S, C); state (S, W-1, C), contiguous, changed in place; weight (C, W), W >= 1; bias (C). Returns a new (S, C) in
    x's dtype, without a gradient. Raises ValueError for what does not fit or would need a gradient, BackendError for a
    backend that cannot run.
    """
    op = "causal_conv1d_update"
    check_dims(op, "x", x, "S, C")
    check_dims(op, "weight", weight, "C, W")
    n_seq, channels = x.shape
    width = max(weight.shape[1], 1)
    check_shape(op, "weight", weight, "C, W", channels, width)
    check_shape(op, "bias", bias, "C", channels)
    check_shape(op, "state", state, "S, W-1, C", n_seq, width - 1, channels)
    check_contiguous(op, "state", state)
    check_no_gradient(op, x, state, weight, bias)
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected None or 'silu'")
    return choose(CAUSAL_CONV1D_UPDATE, backend, x.device, x.dtype)(
        x, state, weight, bias, activation=activation
    )
