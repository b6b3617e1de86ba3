"""A norm, a linear map and a residual in Triton, for up to a few hundred rows: bound by reading the weights once.

    y = residual + r (x o n) W^T + b,   r = 1 / sqrt(mean(x^2) + eps) of each group of channels, n the norm's weights

`vector_kernel`, one or two rows: a program has a few outputs and all their weights in registers at once. It asks for
them before anything else, so that all of memory's answers are under way while it computes the norm of x, which every
program does for itself: x is small, and a launch of its own would cost more than the whole map.

`matrix_kernel`, more rows: x and W in tiles through tensor cores. The norm's factor of a group is known when its tiles
have passed, and is multiplied onto the group's sum then.

Either may end with the short convolution of some of the outputs (`CONVOLVED`), for which a program has all that it
needs: the channel's window of past inputs, which it alone reads and moves on, and its newest, which it has just made.

Nothing is added up across programs: two runs are equal bit for bit.
"""

# Triton kernels read like Python but are typed by Triton.
# mypy: ignore-errors
# Triton knows no (*a, b).
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.selective_scan.gpu_tiles import sigmoid


@triton.jit
def window_of(state_ptr, taps_ptr, conv_bias_ptr, row, c, inside, conv_channels, WIDTH: tl.constexpr,
              BIAS: tl.constexpr):  # fmt: skip
    """Past inputs of channels c of sequences `row` and their sum over all taps but the last, with the bias."""
    own = state_ptr + row * (WIDTH - 1) * conv_channels + c
    window = ()
    total = c * 0.0
    if BIAS:
        total += tl.load(conv_bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        past = tl.load(own + j * conv_channels, mask=inside, other=0.0)
        total += past.to(tl.float32) * tl.load(taps_ptr + c * WIDTH + j, mask=inside, other=0.0).to(
            tl.float32
        )
        window = window + (past,)
    last = tl.load(taps_ptr + c * WIDTH + WIDTH - 1, mask=inside, other=0.0).to(tl.float32)
    return window, total, last


@triton.jit
def convolved(y, window, total, last, state_ptr, row, c, inside, conv_channels, dtype, WIDTH: tl.constexpr):
    """y, or for channels inside silu of their convolution, whose window moves on; y as its rounded self in `dtype`."""
    own = state_ptr + row * (WIDTH - 1) * conv_channels + c
    given = y.to(dtype)
    tl.debug_barrier()  # several threads may have read a number that one of them now writes
    for j in tl.static_range(1, WIDTH - 1):
        tl.store(own + (j - 1) * conv_channels, window[j], mask=inside)
    if WIDTH > 1:
        tl.store(own + (WIDTH - 2) * conv_channels, given.to(state_ptr.dtype.element_ty), mask=inside)
    total = total + last * given.to(tl.float32)
    return tl.where(inside, total * sigmoid(total), y)


@triton.jit
def vector_kernel(x_ptr, w_ptr, norm_ptr, bias_ptr, residual_ptr, y_ptr, state_ptr, taps_ptr, conv_bias_ptr, channels,
                  outputs, x_s, w_s, residual_s, size, eps, first, conv_channels, ROWS: tl.constexpr, BO: tl.constexpr,
                  BK: tl.constexpr, GROUPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
                  RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, CONV_BIAS: tl.constexpr):  # fmt: skip
    """y (ROWS, outputs) from x (ROWS, channels), channels <= BK; GROUPS of `size` channels, 0: no norm.

    WIDTH > 0: outputs first .. first + conv_channels go through a convolution of so many taps; 0: none do.
    """
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    k = tl.arange(0, BK)
    o_in, k_in = o < outputs, k < channels
    # read once: what is used again need not leave the cache for it
    w = tl.load(
        w_ptr + o[:, None].to(tl.int64) * w_s + k[None, :], mask=o_in[:, None] & k_in[None, :], other=0.0,
        eviction_policy="evict_first",
    )  # fmt: skip
    rows = ()
    for r in tl.static_range(ROWS):
        rows = rows + (tl.load(x_ptr + r * x_s + k, mask=k_in, other=0.0),)
    if WEIGHT:
        n = tl.load(norm_ptr + k, mask=k_in, other=0.0).to(tl.float32)
    bias = tl.zeros((BO,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + o, mask=o_in, other=0.0).to(tl.float32)
    before = ()
    if RESIDUAL:
        for r in tl.static_range(ROWS):
            before = before + (tl.load(residual_ptr + r * residual_s + o, mask=o_in, other=0.0),)
    c = o - first
    inside = (c >= 0) & (c < conv_channels) & o_in
    pasts = ()
    if WIDTH > 0:
        for r in tl.static_range(ROWS):
            pasts = pasts + (
                window_of(state_ptr, taps_ptr, conv_bias_ptr, r, c, inside, conv_channels, WIDTH, CONV_BIAS),
            )
    wide = w.to(tl.float32)
    for r in tl.static_range(ROWS):
        x = rows[r].to(tl.float32)
        u = x
        if WEIGHT:
            u = x * n
        if GROUPS > 1:
            square = x * x
            for g in tl.static_range(GROUPS):
                own = (k >= g * size) & (k < (g + 1) * size)
                mean = tl.sum(tl.where(own, square, 0.0), 0) / size
                u = tl.where(own, u * tl.rsqrt(mean + eps), u)
        y = tl.sum(wide * u[None, :], 1)
        if GROUPS == 1:
            y *= tl.rsqrt(tl.sum(x * x, 0) / size + eps)
        y += bias
        if RESIDUAL:
            y += before[r].to(tl.float32)
        if WIDTH > 0:
            window, total, last = pasts[r]
            y = convolved(
                y, window, total, last, state_ptr, r, c, inside, conv_channels, y_ptr.dtype.element_ty, WIDTH
            )
        tl.store(y_ptr + r * outputs + o, y.to(y_ptr.dtype.element_ty), mask=o_in)


@triton.jit
def matrix_kernel(x_ptr, w_ptr, norm_ptr, bias_ptr, residual_ptr, y_ptr, state_ptr, taps_ptr, conv_bias_ptr, n_rows,
                  outputs, x_s, w_s, residual_s, size, eps, first, conv_channels, blocks, BR: tl.constexpr,
                  BO: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
                  RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, CONV_BIAS: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The same for y (n_rows, outputs); GROUPS 0: `size` is the number of channels."""
    pid = tl.program_id(0)
    o = (pid % blocks) * BO + tl.arange(0, BO)
    r = (pid // blocks) * BR + tl.arange(0, BR)
    o_in, r_in = o < outputs, r < n_rows
    x_at = x_ptr + r[:, None].to(tl.int64) * x_s
    w_at = w_ptr + o[None, :].to(tl.int64) * w_s
    y = tl.zeros((BR, BO), tl.float32)
    at_group = 0
    for _ in range(0, tl.maximum(GROUPS, 1)):
        part = tl.zeros((BR, BO), tl.float32)
        square = tl.zeros((BR, BK), tl.float32)
        for at in range(0, size, BK):
            k = at + tl.arange(0, BK)
            k_in = k < size
            k = at_group + k
            x = tl.load(x_at + k[None, :], mask=r_in[:, None] & k_in[None, :], other=0.0)
            w = tl.load(w_at + k[:, None], mask=o_in[None, :] & k_in[:, None], other=0.0)
            if GROUPS > 0:
                wide = x.to(tl.float32)
                square += wide * wide
                if WEIGHT:
                    n = tl.load(norm_ptr + k, mask=k_in, other=0.0).to(tl.float32)
                    x = (wide * n[None, :]).to(x_ptr.dtype.element_ty)
            part = tl.dot(x, w, part, input_precision=PRECISION)
        if GROUPS > 0:
            part *= tl.rsqrt(tl.sum(square, 1) / size + eps)[:, None]
        y += part
        at_group += size
    if BIAS:
        y += tl.load(bias_ptr + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
    both = r_in[:, None] & o_in[None, :]
    if RESIDUAL:
        at = residual_ptr + r[:, None].to(tl.int64) * residual_s + o[None, :]
        y += tl.load(at, mask=both, other=0.0).to(tl.float32)
    if WIDTH > 0:
        row = r[:, None].to(tl.int64)
        c = o[None, :] - first + row * 0
        inside = (c >= 0) & (c < conv_channels) & both
        window, total, last = window_of(
            state_ptr, taps_ptr, conv_bias_ptr, row, c, inside, conv_channels, WIDTH, CONV_BIAS
        )
        y = convolved(
            y, window, total, last, state_ptr, row, c, inside, conv_channels, y_ptr.dtype.element_ty, WIDTH
        )
    tl.store(y_ptr + r[:, None].to(tl.int64) * outputs + o[None, :], y.to(y_ptr.dtype.element_ty), mask=both)
