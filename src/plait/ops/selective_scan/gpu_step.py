"""One decoding step of the selective scan in Triton: read the state, decay it, add the token, write y and the state."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.selective_scan.gpu_tiles import sigmoid
from plait.ops.triton_support import LOG2E, cdiv, on_device, plain_op, power_of_2, softplus

BLOCK = 1024
"""Elements of the state a program updates."""


@triton.jit
def step_kernel(
    x_p,
    dt_p,
    z_p,
    a_p,
    b_p,
    c_p,
    d_p,
    bias_p,
    before_p,
    after_p,
    y_p,
    x_r,
    x_e,
    dt_r,
    dt_e,
    z_r,
    z_e,
    a_e,
    a_n,
    b_r,
    b_g,
    b_n,
    c_r,
    c_g,
    c_n,
    y_r,
    y_e,
    channels,
    group_channels,
    states,
    E: tl.constexpr,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """A program: E channels of a sequence; N is the number of states rounded up."""
    e = tl.program_id(0) * E + tl.arange(0, E)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)[None, :]
    live = e < channels
    group = (e // group_channels)[:, None]
    real = live[:, None] & (n < states)
    x = tl.load(x_p + row * x_r + e * x_e, mask=live, other=0.0).to(tl.float32)
    dt = tl.load(dt_p + row * dt_r + e * dt_e, mask=live, other=0.0).to(tl.float32)
    a = tl.load(a_p + e[:, None] * a_e + n * a_n, mask=real, other=0.0).to(tl.float32)
    b = tl.load(b_p + row * b_r + group * b_g + n * b_n, mask=real, other=0.0).to(tl.float32)
    c = tl.load(c_p + row * c_r + group * c_g + n * c_n, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        dt += tl.load(bias_p + e, mask=live, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    h = (dt * x)[:, None] * b
    at = row * channels * states + e[:, None] * states + n
    if INITIAL:
        h += tl.exp2(dt[:, None] * (a * LOG2E)) * tl.load(before_p + at, mask=real, other=0.0).to(tl.float32)
    tl.store(after_p + at, h, mask=real)
    y = tl.sum(h * c, 1)
    if SKIP:
        y += tl.load(d_p + e, mask=live, other=0.0).to(tl.float32) * x
    if GATE:
        z = tl.load(z_p + row * z_r + e * z_e, mask=live, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_p + row * y_r + e * y_e, y.to(y_p.dtype.element_ty), mask=live)


def _step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y (S, 1, E) and the new state (S, E, N) in float32, both new."""
    y, after = _fake_step(x, dt, A, B, C, D, z, dt_bias, initial, softplus)
    (rows, _, channels), states = x.shape, A.shape[1]
    if after.numel() == 0:
        return y.zero_(), after
    groups = B.shape[2] if B.dim() == 4 else 1
    width = power_of_2(states)
    block = min(power_of_2(cdiv(BLOCK, width)), power_of_2(channels))
    gate = x if z is None else z
    before = after if initial is None else initial.contiguous()
    with on_device(x):
        step_kernel[(cdiv(channels, block), rows)](
            x, dt, gate, A, B, C, x if D is None else D, x if dt_bias is None else dt_bias, before, after, y,
            x.stride(0), x.stride(2), dt.stride(0), dt.stride(2), gate.stride(0), gate.stride(2), *A.stride(),
            B.stride(0), B.stride(2) if B.dim() == 4 else 0, B.stride(-1),
            C.stride(0), C.stride(2) if C.dim() == 4 else 0, C.stride(-1), y.stride(0), y.stride(2),
            channels, channels // groups, states, E=block, N=width, SOFTPLUS=softplus, BIAS=dt_bias is not None,
            SKIP=D is not None, GATE=z is not None, INITIAL=initial is not None, num_warps=4,
        )  # fmt: skip
    return y, after


def _fake_step(x, dt, A, B, C, D, z, dt_bias, initial, softplus):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)


step = plain_op("selective_scan_gpu_step", _step, _fake_step)
"""The step as a custom op."""
