"""One new token of Mamba-1's recurrence (arXiv 2312.00752, section 3), the state changed in place.

S sequences, E channels, N states a channel, R rank of the time step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_contiguous, check_dims, check_no_gradient, check_shape
from plait.ops.dispatch import Op, choose

SELECTIVE_STATE_UPDATE = Op(
    "selective_state_update",
    {
        "gpu": "plait.ops.selective_state_update.gpu:selective_state_update",
        "cpu": "plait.ops.selective_state_update.cpu:selective_state_update",
        "portable": "plait.ops.selective_state_update.portable:selective_state_update",
        "reference": "plait.ops.selective_state_update.reference:selective_state_update",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)},
)


def selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """h <- exp(dt A) h + dt x B;  y = (h C + D x) silu(z), with dt = softplus(dt_weight dt + dt_bias).

    x, z (S, E); dt (S, E), or (S, R) with dt_weight (E, R); A (E, N), negative; B, C (S, N); D, dt_bias (E); state
    (S, E, N), contiguous, changed in place. z None: no gate. Computed in float32 (float64 for float64 x). Returns a new
    (S, E) in x's dtype, without a gradient. Raises ValueError for what does not fit or would need a gradient,
    BackendError for a backend that cannot run.
    """
    op = "selective_state_update"
    check_dims(op, "x", x, "S, E")
    check_dims(op, "A", A, "E, N")
    (n_seq, channels), states = x.shape, A.shape[1]
    check_shape(op, "A", A, "E, N", channels, states)
    check_shape(op, "B", B, "S, N", n_seq, states)
    check_shape(op, "C", C, "S, N", n_seq, states)
    check_shape(op, "D", D, "E", channels)
    check_shape(op, "z", z, "S, E", n_seq, channels)
    check_shape(op, "dt_bias", dt_bias, "E", channels)
    check_shape(op, "state", state, "S, E, N", n_seq, channels, states)
    if dt_weight is None:
        check_shape(op, "dt", dt, "S, E", n_seq, channels)
    else:
        check_dims(op, "dt_weight", dt_weight, "E, R")
        check_shape(op, "dt_weight", dt_weight, "E, R", channels, dt_weight.shape[1])
        check_shape(op, "dt", dt, "S, R", n_seq, dt_weight.shape[1])
    check_contiguous(op, "state", state)
    check_no_gradient(op, x, dt, A, B, C, D, state, z, dt_bias, dt_weight)
    return choose(SELECTIVE_STATE_UPDATE, backend, x.device, x.dtype)(
        x, dt, A, B, C, D, state, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_weight=dt_weight
    )
