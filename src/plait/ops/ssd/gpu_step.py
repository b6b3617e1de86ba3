"""Decoding on a GPU: Mamba-2's recurrence over a few tokens, token after token, with the state read and written once.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t            S (P, N) of each head

What takes time is moving S, so a program holds a few rows of it (of the head's P channels) and all of N, in float32.
"""

from __future__ import annotations

# Triton kernels read like Python but are typed by Triton.
# mypy: ignore-errors
import triton
import triton.language as tl

from plait.ops.triton_support import LOG2E, softplus


@triton.jit
def step_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, from_ptr, to_ptr, y_ptr,
                L, H, SLICES, HEADS_PER_GROUP, x_s, x_t, x_h, dt_s, dt_t, dt_h, B_s, B_t, B_g, C_s, C_t, C_g,
                low, high, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
                SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """y (S, L, H, P) and the last state `to` (S, H, P, N) from the state `from` (zeros unless GIVEN; may be `to`)."""
    pid = tl.program_id(0).to(tl.int64)
    slice_ = (pid % SLICES).to(tl.int32)
    h = (pid // SLICES) % H
    s = pid // SLICES // H
    g = h // HEADS_PER_GROUP
    p = slice_ * PB + tl.arange(0, PB)
    n = tl.arange(0, NB)
    p_in, n_in = p < P, n < N
    tile = (s * H + h) * (P * N) + (p[:, None] * N + n[None, :])
    mask = p_in[:, None] & n_in[None, :]
    S = tl.zeros((PB, NB), tl.float32)
    if GIVEN:
        S = tl.load(from_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h).to(tl.float32) * LOG2E
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + h).to(tl.float32)
    if SKIP == 1:
        D = tl.load(D_ptr + h).to(tl.float32)
    elif SKIP == 2:
        D = tl.load(D_ptr + h * P + p, mask=p_in, other=0.0).to(tl.float32)
    x_at = x_ptr + s * x_s + h * x_h + p
    dt_at = dt_ptr + s * dt_s + h * dt_h
    B_at = B_ptr + s * B_s + g * B_g + n
    C_at = C_ptr + s * C_s + g * C_g + n
    y_at = y_ptr + (s * L * H + h) * P + p
    for t in range(0, L):
        dt = tl.load(dt_at + t * dt_t).to(tl.float32) + bias
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.clamp(dt, low, high, propagate_nan=tl.PropagateNan.ALL)
        x = tl.load(x_at + t * x_t, mask=p_in, other=0.0).to(tl.float32)
        B = tl.load(B_at + t * B_t, mask=n_in, other=0.0).to(tl.float32)
        C = tl.load(C_at + t * C_t, mask=n_in, other=0.0).to(tl.float32)
        S = S * tl.exp2(dt * A) + (dt * x)[:, None] * B[None, :]
        y = tl.sum(S * C[None, :], 1)
        if SKIP > 0:
            y += D * x
        tl.store(y_at + t * (H * P), y.to(y_ptr.dtype.element_ty), mask=p_in)
    tl.store(to_ptr + tile, S, mask=mask)
