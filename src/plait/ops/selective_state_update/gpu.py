"""One token of Mamba-1's recurrence in Triton: the state is read, decayed, added to, read out and written back.

A program has some channels of one sequence and all their states. Time steps of low rank are made on the way: a row of
their weights for each channel.
"""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.selective_scan.gpu_tiles import sigmoid
from plait.ops.triton_launch import Launch
from plait.ops.triton_steps import StepOp, columns
from plait.ops.triton_support import LOG2E, cdiv, multiprocessors, power_of_2, softplus

BLOCK = 1024
"""Numbers of the state, and of the weights of its time steps, that a program holds at most."""


@triton.jit
def update_kernel(
    x_p, dt_p, z_p, a_p, b_p, c_p, d_p, bias_p, weight_p, state_p, y_p, x_s, dt_s, z_s, b_s, c_s, channels, states,
    rank, blocks, E: tl.constexpr, N: tl.constexpr, R: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    """E channels of a sequence; N states and R ranks, both rounded up. A, the weights and the state are contiguous."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * E + tl.arange(0, E)
    n = tl.arange(0, N)
    live, real = e < channels, n < states
    tile, both = e[:, None] * states + n[None, :], live[:, None] & real[None, :]
    own = state_p + row * channels * states + tile
    h = tl.load(own, mask=both, other=0.0)
    a = tl.load(a_p + tile, mask=both, other=0.0).to(tl.float32)
    x = tl.load(x_p + row * x_s + e, mask=live, other=0.0).to(tl.float32)
    b = tl.load(b_p + row * b_s + n, mask=real, other=0.0).to(tl.float32)
    c = tl.load(c_p + row * c_s + n, mask=real, other=0.0).to(tl.float32)
    if LOW_RANK:
        r = tl.arange(0, R)
        low = tl.load(dt_p + row * dt_s + r, mask=r < rank, other=0.0).to(tl.float32)
        inside = live[:, None] & (r < rank)[None, :]
        w = tl.load(weight_p + e[:, None] * rank + r[None, :], mask=inside, other=0.0).to(tl.float32)
        dt = tl.sum(w * low[None, :], 1)
    else:
        dt = tl.load(dt_p + row * dt_s + e, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        dt += tl.load(bias_p + e, mask=live, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    h = h * tl.exp2(dt[:, None] * (a * LOG2E)) + (dt * x)[:, None] * b[None, :]
    tl.debug_barrier()  # several threads may have read a number that one of them now writes
    tl.store(own, h, mask=both)
    y = tl.sum(h * c[None, :], 1)
    if SKIP:
        y += tl.load(d_p + e, mask=live, other=0.0).to(tl.float32) * x
    if GATE:
        z = tl.load(z_p + row * z_s + e, mask=live, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_p + row * channels + e, y.to(y_p.dtype.element_ty), mask=live)


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
    """Shapes as in `plait.ops.selective_state_update`; the state is changed in place."""
    return UPDATE(x, dt, A, B, C, D, state, z, dt_bias, dt_weight, dt_softplus)


def _update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    softplus: bool,
) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    x, dt, B, C = columns(x), columns(dt), columns(B), columns(C)
    gate = x if z is None else columns(z)
    launch = _launch(
        x.shape, A.shape[1], dt.shape[1], (x.stride(0), dt.stride(0), gate.stride(0), B.stride(0), C.stride(0)),
        softplus, x.device,
        tuple(None if t is None else t.dtype for t in (x, D, z, dt_bias, dt_weight, dt, A, B, C, state)),
    )  # fmt: skip
    launch(
        x, dt, gate, A.contiguous(), B, C, *(x if t is None else t.contiguous() for t in (D, dt_bias, dt_weight)),
        state, y,
    )  # fmt: skip
    return y


def _fake(x, dt, A, B, C, D, state, z, dt_bias, dt_weight, softplus):
    return x.new_empty(x.shape)


UPDATE = StepOp("selective_state_update_gpu", _update, _fake, ("state",))
"""The kernel as a custom op."""


@lru_cache(maxsize=1024)
def _launch(
    shape: torch.Size,
    states: int,
    rank: int,
    strides: tuple[int, ...],
    softplus: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
) -> Launch:
    rows, channels = shape
    low = dtypes[4] is not None
    width, ranks = power_of_2(states), power_of_2(rank) if low else 1
    block = channels_of(rows, channels, max(width, ranks), 2 * multiprocessors(device))
    blocks = cdiv(channels, block)
    return Launch(
        update_kernel, rows * blocks, (*strides, channels, states, rank if low else 0, blocks), E=block, N=width,
        R=ranks, SOFTPLUS=softplus, BIAS=dtypes[3] is not None, SKIP=dtypes[1] is not None, GATE=dtypes[2] is not None,
        LOW_RANK=low, num_warps=2,
    )  # fmt: skip


def channels_of(rows: int, channels: int, width: int, programs: int) -> int:
    """Channels a program, each with tiles of so many numbers; `programs` or more of them fill the device."""
    block = min(power_of_2(max(BLOCK // width, 1)), power_of_2(channels))
    while block > 4 and rows * cdiv(channels, block) < programs:
        block //= 2
    return block
