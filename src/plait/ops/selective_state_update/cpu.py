"""One new token of Mamba-1's recurrence on CPUs: one Numba kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.norm_linear.cpu import known, single, together
from plait.ops.numba_team import address, call
from plait.ops.selective_state_update import portable
from plait.ops.selective_state_update.cpu_kernels import CHANNELS, STEP


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
) -> Tensor:
    """Shapes as in `plait.ops.selective_state_update`; x float32 or bfloat16; the state is changed in place.

    States that are not float32, and traces of torch.compile, are served by `portable`'s operations.
    """
    if state.dtype is not torch.float32 or torch.compiler.is_compiling():
        return portable.selective_state_update(
            x, dt, A, B, C, D, state, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_weight=dt_weight
        )
    (n_seq, channels), states = x.shape, A.shape[1]
    x, dt, B, C, z = together(x), together(dt), together(B), together(C), None if z is None else together(z)
    A, D, dt_bias = single(A), None if D is None else single(D), None if dt_bias is None else single(dt_bias)
    dt_weight = None if dt_weight is None else known(dt_weight)
    y = x.new_empty(n_seq, channels)
    call(
        STEP,
        n_seq * -(-channels // CHANNELS),
        channels,
        states,
        0 if dt_weight is None else dt_weight.shape[1],
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        x.stride(0),
        dt.data_ptr(),
        dt.dtype is torch.bfloat16,
        dt.stride(0),
        address(z),
        z is not None and z.dtype is torch.bfloat16,
        0 if z is None else z.stride(0),
        A.data_ptr(),
        B.data_ptr(),
        B.dtype is torch.bfloat16,
        B.stride(0),
        C.data_ptr(),
        C.dtype is torch.bfloat16,
        C.stride(0),
        address(D),
        address(dt_bias),
        dt_softplus,
        address(dt_weight),
        dt_weight is not None and dt_weight.dtype is torch.bfloat16,
        state.data_ptr(),
        y.data_ptr(),
        y.dtype is torch.bfloat16,
        keep=(x, dt, A, B, C, D, z, dt_bias, dt_weight, state, y),
    )
    return y
