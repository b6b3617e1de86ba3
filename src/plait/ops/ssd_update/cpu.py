"""One new token of Mamba-2 between its projections on CPUs: two Numba kernels, the convolution and the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.causal_conv1d_update.cpu import convolve
from plait.ops.norm_linear.cpu import KNOWN, single, together
from plait.ops.numba_team import address, bits, call
from plait.ops.ssd_update import portable
from plait.ops.ssd_update.cpu_kernels import STEP


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
    dt_limit: tuple[float, float],
) -> Tensor:
    """Shapes as in `plait.ops.ssd_update`; xbc float32 or bfloat16; both states are changed in place.

    States in other dtypes, and traces of torch.compile, are served by `portable`'s operations.
    """
    known = conv_state is None or conv_state.dtype in KNOWN
    if ssm_state.dtype is not torch.float32 or not known or torch.compiler.is_compiling():
        return portable.ssd_update(
            z, xbc, dt, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias, ngroups=ngroups, dt_limit=dt_limit
        )  # fmt: skip
    n_seq, heads, width, states = ssm_state.shape
    if conv_state is None or conv_weight is None:
        mixed = xbc.float().contiguous()
    else:
        mixed = xbc.new_empty(xbc.shape, dtype=torch.float32)
        convolve(xbc, conv_state, conv_weight, conv_bias, True, mixed)
    dt, z = together(dt), None if z is None else together(z)
    A, D, dt_bias = single(A), None if D is None else single(D), None if dt_bias is None else single(dt_bias)
    u = xbc.new_empty(n_seq, heads * width)
    call(
        STEP,
        n_seq * heads,
        heads,
        width,
        states,
        ngroups,
        xbc.shape[1],
        mixed.data_ptr(),
        address(z),
        z is not None and z.dtype is torch.bfloat16,
        0 if z is None else z.stride(0),
        dt.data_ptr(),
        dt.dtype is torch.bfloat16,
        dt.stride(0),
        A.data_ptr(),
        address(D),
        D is not None and D.dim() == 2,
        address(dt_bias),
        bits(dt_limit[0]),
        bits(dt_limit[1]),
        ssm_state.data_ptr(),
        u.data_ptr(),
        u.dtype is torch.bfloat16,
        keep=(mixed, z, dt, A, D, dt_bias, ssm_state, u),
    )
    return u
