"""One token of Mamba-2 between its projections in Triton: the convolution, then the recurrence with skip and gate.

    S <- exp(dt A) S + dt x B^T;   u = (S C + D x) silu(z)                             S (P, N) of each head

All heads of a group, and all slices of a head, read what the convolution makes of the group's B and C; so one program
alone convolves a channel and moves its window on, in a launch before theirs: here, or in `convolved_linear`.
"""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.causal_conv1d_update.gpu import causal_conv1d_update
from plait.ops.selective_scan.gpu_tiles import sigmoid
from plait.ops.triton_launch import Launch
from plait.ops.triton_steps import StepOp, columns
from plait.ops.triton_support import LOG2E, cdiv, multiprocessors, power_of_2, softplus

BLOCK = 2048
"""Numbers of the state a program holds at most, if that still fills the device."""
LEAST = 512
"""Numbers it holds at least."""


@triton.jit
def update_kernel(
    z_p, mixed_p, dt_p, a_p, d_p, bias_p, state_p, u_p, z_s, mixed_s, dt_s, heads, per_group, slices, states_at, low,
    high, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, GROUPS: tl.constexpr,
    GATE: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A slice of PB of a head's P channels; B and C stand at `states_at` in a row of the convolution's outputs."""
    pid = tl.program_id(0).to(tl.int64)
    p = (pid % slices).to(tl.int32) * PB + tl.arange(0, PB)
    h = (pid // slices % heads).to(tl.int32)
    row = pid // slices // heads
    n = tl.arange(0, NB)
    p_in, n_in = p < P, n < N
    both = p_in[:, None] & n_in[None, :]
    own = state_p + (row * heads + h) * (P * N) + (p[:, None] * N + n[None, :])
    S = tl.load(own, mask=both, other=0.0)
    mixed = mixed_p + row * mixed_s
    x = tl.load(mixed + h * P + p, mask=p_in, other=0.0).to(tl.float32)
    b_at = mixed + states_at + h // per_group * N + n
    b = tl.load(b_at, mask=n_in, other=0.0).to(tl.float32)
    c = tl.load(b_at + GROUPS * N, mask=n_in, other=0.0).to(tl.float32)
    dt = tl.load(dt_p + row * dt_s + h).to(tl.float32)
    a = tl.load(a_p + h).to(tl.float32) * LOG2E
    if BIAS:
        dt += tl.load(bias_p + h).to(tl.float32)
    dt = tl.clamp(softplus(dt), low, high, propagate_nan=tl.PropagateNan.ALL)
    S = S * tl.exp2(dt * a) + (dt * x)[:, None] * b[None, :]
    tl.debug_barrier()  # several threads may have read a number that one of them now writes
    tl.store(own, S, mask=both)
    u = tl.sum(S * c[None, :], 1)
    if SKIP == 1:
        u += tl.load(d_p + h).to(tl.float32) * x
    elif SKIP == 2:
        u += tl.load(d_p + h * P + p, mask=p_in, other=0.0).to(tl.float32) * x
    if GATE:
        z = tl.load(z_p + row * z_s + h * P + p, mask=p_in, other=0.0).to(tl.float32)
        u *= z * sigmoid(z)
    tl.store(u_p + (row * heads + h) * P + p, u.to(u_p.dtype.element_ty), mask=p_in)


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
    """Shapes as in `plait.ops.ssd_update`; both states are changed in place."""
    mixed = columns(xbc)
    if conv_state is not None and conv_weight is not None:
        mixed = causal_conv1d_update(xbc, conv_state, conv_weight, conv_bias, activation="silu")
    low, high = float(dt_limit[0]), float(dt_limit[1])
    return UPDATE(z, mixed, dt, ssm_state, A, D, dt_bias, ngroups, low, high)


def _update(
    z: Tensor | None,
    mixed: Tensor,
    dt: Tensor,
    state: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    groups: int,
    low: float,
    high: float,
) -> Tensor:
    """The recurrence after the convolution, whose outputs are `mixed` (S, H P + 2 G N)."""
    u = mixed.new_empty(state.shape[0], state.shape[1] * state.shape[2])
    if u.numel() == 0:
        return u
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    gate = mixed if z is None else columns(z)
    launch = _launch(
        state.shape, (gate.stride(0), mixed.stride(0), dt.stride(0)), groups, low, high, mixed.device,
        0 if D is None else D.dim(),
        tuple(None if t is None else t.dtype for t in (z, dt_bias, mixed, dt, A, D, state)),
    )  # fmt: skip
    launch(
        gate, mixed, dt, A.contiguous(), *(mixed if t is None else t.contiguous() for t in (D, dt_bias)), state, u
    )  # fmt: skip
    return u


def _fake(z, mixed, dt, state, A, D, dt_bias, groups, low, high):
    return mixed.new_empty(state.shape[0], state.shape[1] * state.shape[2])


UPDATE = StepOp("ssd_update_gpu", _update, _fake, ("state",))
"""The recurrence as a custom op."""


@lru_cache(maxsize=1024)
def _launch(
    shape: torch.Size,
    strides: tuple[int, ...],
    groups: int,
    low: float,
    high: float,
    device: torch.device,
    skip: int,
    dtypes: tuple[torch.dtype | None, ...],
) -> Launch:
    rows, heads, width, states = shape
    padded = power_of_2(states)
    block = slice_of(rows * heads, width, padded, 2 * multiprocessors(device))
    slices = cdiv(width, block)
    return Launch(
        update_kernel, rows * heads * slices,
        (*strides, heads, heads // groups, slices, heads * width, low, high), P=width, N=states, PB=block, NB=padded,
        GROUPS=groups, GATE=dtypes[0] is not None, SKIP=skip, BIAS=dtypes[1] is not None, num_warps=4,
    )  # fmt: skip


def slice_of(heads: int, width: int, states: int, programs: int) -> int:
    """Channels of a head that a program takes; `programs` or more of them fill the device."""
    block = min(power_of_2(max(BLOCK // states, 1)), power_of_2(width))
    while block * states > LEAST and block > 1 and heads * cdiv(width, block) < programs:
        block //= 2
    return block
