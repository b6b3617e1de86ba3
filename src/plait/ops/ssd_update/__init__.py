"""One new token of Mamba-2 between its projections (arXiv 2405.21060): convolution, recurrence, skip and gate.

S sequences, H heads of width P, N states, G groups of B and C, W taps; C = H P + 2 G N channels of the convolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.ops.checks import check_contiguous, check_dims, check_no_gradient, check_shape
from plait.ops.dispatch import Op, choose

SSD_UPDATE = Op(
    "ssd_update",
    {
        "gpu": "plait.ops.ssd_update.gpu:ssd_update",
        "cpu": "plait.ops.ssd_update.cpu:ssd_update",
        "portable": "plait.ops.ssd_update.portable:ssd_update",
        "reference": "plait.ops.ssd_update.reference:ssd_update",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)},
)


def ssd_update(
    z: Tensor | None,
    xbc: Tensor,
    dt: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    ngroups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: str | None = None,
) -> Tensor:
    """[x, B, C] = silu(conv(xbc));  S <- exp(dt A) S + dt x B^T;  u = (S C + D x) silu(z), dt = softplus(dt + dt_bias).

    z (S, H P), None: no gate; xbc (S, C); dt (S, H), clamped to `dt_limit` after the softplus; conv_state (S, W-1, C)
    and ssm_state (S, H, P, N), contiguous, changed in place; conv_weight (C, W), conv_bias (C); conv_state and both of
    these None: xbc has been convolved; A (H), negative; D (H) or (H, P); dt_bias (H). z, xbc and dt may be columns of
    one projection. Computed in float32 (float64 for float64 xbc). Returns a new u (S, H P) in xbc's dtype, without a
    gradient. Raises ValueError for what does not fit or would need a gradient, BackendError for a backend that cannot
    run.
    """
    op = "ssd_update"
    check_dims(op, "xbc", xbc, "S, C")
    check_dims(op, "ssm_state", ssm_state, "S, H, P, N")
    n_seq, heads, width, states = ssm_state.shape
    if ngroups < 1 or heads % ngroups:
        raise ValueError(f"{op}: ngroups is {ngroups}, expected a divisor of the {heads} heads")
    channels = heads * width + 2 * ngroups * states
    check_shape(op, "xbc", xbc, "S, H P + 2 G N", n_seq, channels)
    check_shape(op, "z", z, "S, H P", n_seq, heads * width)
    check_shape(op, "dt", dt, "S, H", n_seq, heads)
    if conv_weight is not None and conv_state is not None:
        check_dims(op, "conv_weight", conv_weight, "C, W")
        taps = max(conv_weight.shape[1], 1)
        check_shape(op, "conv_state", conv_state, "S, W-1, C", n_seq, taps - 1, channels)
        check_shape(op, "conv_weight", conv_weight, "C, W", channels, taps)
        check_shape(op, "conv_bias", conv_bias, "C", channels)
        check_contiguous(op, "conv_state", conv_state)
    elif any(t is not None for t in (conv_state, conv_weight, conv_bias)):
        raise ValueError(
            f"{op}: conv_state and conv_weight belong together: give both, or none and no conv_bias"
        )
    check_shape(op, "A", A, "H", heads)
    check_shape(op, "dt_bias", dt_bias, "H", heads)
    if D is not None and D.dim() == 2:
        check_shape(op, "D", D, "H, P", heads, width)
    else:
        check_shape(op, "D", D, "H", heads)
    check_contiguous(op, "ssm_state", ssm_state)
    check_no_gradient(op, z, xbc, dt, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias)
    return choose(SSD_UPDATE, backend, xbc.device, xbc.dtype)(
        z, xbc, dt, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias, ngroups=ngroups, dt_limit=dt_limit
    )  # fmt: skip
