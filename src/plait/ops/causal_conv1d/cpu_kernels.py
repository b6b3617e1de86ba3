"""The causal depthwise convolution as Numba kernels: one pass over the memory forward, one backward.

n rows (tokens) of C channels, in which S sequences begin; sequence s is rows bounds[s] to bounds[s+1].

    p_t = bias + sum_j w_j x_{t-W+1+j}        y_t = act(p_t)
    g_t = dy_t act'(p_t)                      dx_t = sum_j w_j g_{t+W-1-j}    dw_j = sum_t g_t x_{t-W+1+j}

A task is a run of ROWS rows by CHANNELS channels. It walks down the rows with the last W inputs (and, backward, the
last W gradients) as float32 in small rings that stay in the first-level cache; at the beginning of a sequence the
ring is filled with its initial state. So nothing else knows about boundaries: the state's gradient is dx of the
W - 1 rows before the first, and gradients beyond the last row are 0. Sums over rows are kept per task and added in
the order of the rows, whatever the number of threads.

`taps` is a tuple of W zeros, whose length is a constant for the compiler; `silu` is None or True, for the same reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import (
    KERNEL,
    LANES,
    PIECE,
    first,
    load,
    prefetch,
    sigmoid,
    store,
)

TILES = "e7660550"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
ROWS, CHANNELS = 128, 512
AHEAD = 4  # rows: how far ahead memory is asked for
_ONE = np.float32(1.0)


@njit(**PIECE)
def _copy(source: Any, at: int, target: Any, to: int, width: int) -> None:
    """Copy `width` channels, changing the dtype."""
    whole = width - width % LANES
    for c in range(0, whole, LANES):
        store(target, to + c, load(source, at + c, None), None)
    if whole < width:
        lanes = first(width - whole)
        store(target, to + whole, load(source, at + whole, lanes), lanes)


@njit(**KERNEL)
def _input(
    x: Any, step: int, tail: Any, row: int, begin: int, s: int, reach: int, c0: int, channels: int, width: int,
    target: Any, to: int,
) -> None:  # fmt: skip
    """Copy input `row` of sequence s, which begins at row `begin`; before that lies its initial state, or zeros."""
    if row >= begin:
        _copy(x, row * step + c0, target, to, width)
    elif tail.size > 0:
        _copy(tail, (s * reach + row - begin + reach) * channels + c0, target, to, width)
    else:
        target[to : to + width] = 0


@njit(**PIECE)
def _slot(row: int, taps: Any) -> int:
    """Where a ring keeps a row (row > -W)."""
    return (row + len(taps)) % len(taps) * CHANNELS


@njit(**PIECE)
def _sum(
    x: Any,
    at: int,
    w: Any,
    bias: Any,
    ring: Any,
    c: int,
    c0: int,
    channels: int,
    t: int,
    taps: Any,
    lanes: Any,
) -> Any:
    """Put the inputs of row t into the ring; return p_t of these channels."""
    last = len(taps) - 1
    now = load(x, at + c, lanes)
    store(ring, _slot(t, taps) + c, now, None)
    p = load(bias, c0 + c, lanes) + now * load(w, last * channels + c0 + c, lanes)
    for j in range(last):
        p = p + load(ring, _slot(t - last + j, taps) + c, None) * load(w, j * channels + c0 + c, lanes)
    return p


@njit(**PIECE)
def _forward_part(
    x: Any, at: int, w: Any, bias: Any, ring: Any, c: int, c0: int, channels: int, t: int, taps: Any, silu: Any,
    y: Any, lanes: Any,
) -> None:  # fmt: skip
    """y_t of at most LANES channels from c0 + c on."""
    p = _sum(x, at, w, bias, ring, c, c0, channels, t, taps, lanes)
    if silu is not None:
        p = p * sigmoid(p)
    store(y, t * channels + c0 + c, p, lanes)


@njit(**PIECE)
def _gradient_part(
    x: Any, at: int, dy: Any, dy_at: int, w: Any, bias: Any, ring: Any, grads: Any, sums: Any, to: int,
    c: int, c0: int, channels: int, t: int, taps: Any, silu: Any, lanes: Any,
) -> None:  # fmt: skip
    """Put g_t of at most LANES channels into the ring `grads`, and add to the sums of dw and dbias at `to`."""
    p = _sum(x, at, w, bias, ring, c, c0, channels, t, taps, lanes)
    g = load(dy, dy_at + c, lanes)
    if silu is not None:
        s = sigmoid(p)
        g = g * (s * (_ONE + p * (_ONE - s)))
    store(grads, _slot(t, taps) + c, g, None)
    last = len(taps) - 1
    for j in range(last + 1):
        at_j = to + j * CHANNELS + c
        store(sums, at_j, load(sums, at_j, None) + g * load(ring, _slot(t - last + j, taps) + c, None), None)
    at_bias = to + (last + 1) * CHANNELS + c
    store(sums, at_bias, load(sums, at_bias, None) + g, None)


@njit(**PIECE)
def _input_part(
    grads: Any, w: Any, dfinal: Any, from_final: int, dx: Any, to: int, c: int, c0: int, channels: int, d: int,
    taps: Any, lanes: Any,
) -> None:  # fmt: skip
    """dx of row d, at most LANES channels; from_final is the row of dfinal that is added, or -1."""
    last = len(taps) - 1
    total = load(grads, _slot(d, taps) + c, None) * load(w, last * channels + c0 + c, lanes)
    for j in range(last):
        total = total + load(grads, _slot(d + last - j, taps) + c, None) * load(
            w, j * channels + c0 + c, lanes
        )
    if from_final >= 0:
        total = total + load(dfinal, from_final * channels + c0 + c, lanes)
    store(dx, to + c, total, lanes)


@njit(**KERNEL)
def _input_row(
    grads: Any, w: Any, dfinal: Any, from_final: int, dx: Any, to: int, c0: int, channels: int, width: int, d: int,
    taps: Any,
) -> None:  # fmt: skip
    """dx of row d."""
    whole = width - width % LANES
    for c in range(0, whole, LANES):
        _input_part(grads, w, dfinal, from_final, dx, to, c, c0, channels, d, taps, None)
    if whole < width:
        _input_part(grads, w, dfinal, from_final, dx, to, whole, c0, channels, d, taps, first(width - whole))


@njit(**PIECE)
def _first_sequence(bounds: Any, row: int) -> int:
    """The first sequence that begins at `row` or later, or holds `row`."""
    low, high = 0, bounds.size - 1
    while low < high:
        middle = (low + high) // 2
        if bounds[middle] < row and bounds[middle + 1] <= row:
            low = middle + 1
        else:
            high = middle
    return low


@njit(**KERNEL)
def forward(
    begin_task: int, end_task: int, n: int, channels: int,
    x: Any, step: int, w: Any, bias: Any, tail: Any, bounds: Any, y: Any, final: Any, taps: Any, silu: Any,
) -> None:  # fmt: skip
    """Fill y (n, C) and final (S, W-1, C) from x (n, C) with `step` elements a row, w (W, C), bias (C).

    All arrays are flat. tail (S, W-1, C) may be empty, bounds (S+1,) is int64; y, final and tail have x's dtype,
    float32 or uint16; w and bias are float32.
    """
    reach, columns = len(taps) - 1, (channels + CHANNELS - 1) // CHANNELS
    ring = np.zeros(len(taps) * CHANNELS, np.float32)
    for task in range(begin_task, end_task):
        r0, c0 = task // columns * ROWS, task % columns * CHANNELS
        r1, width = min(r0 + ROWS, n), min(CHANNELS, channels - c0)
        whole = width - width % LANES
        s, stop = _first_sequence(bounds, r0), r1 + (r1 == n)
        while s < bounds.size - 1 and bounds[s] < stop:
            begin, end = bounds[s], bounds[s + 1]
            a, e = max(begin, r0), min(end, r1)
            for t in range(a - reach, a):
                _input(x, step, tail, t, begin, s, reach, c0, channels, width, ring, _slot(t, taps))
            for t in range(a, e):
                at = t * step + c0
                for c in range(0, whole, LANES):
                    prefetch(x, at + AHEAD * step + c)
                    _forward_part(x, at, w, bias, ring, c, c0, channels, t, taps, silu, y, None)
                if whole < width:
                    lanes = first(width - whole)
                    _forward_part(x, at, w, bias, ring, whole, c0, channels, t, taps, silu, y, lanes)
            if begin >= r0:  # the final state belongs to the task in which the sequence begins
                for j in range(reach):
                    to = (s * reach + j) * channels + c0
                    _input(x, step, tail, end - reach + j, begin, s, reach, c0, channels, width, final, to)
            s += 1


@njit(**KERNEL)
def backward(
    begin_task: int, end_task: int, n: int, channels: int,
    dy: Any, dy_step: int, dfinal: Any, x: Any, step: int, w: Any, bias: Any, tail: Any, bounds: Any, dx: Any,
    dtail: Any, sums: Any, taps: Any, silu: Any,
) -> None:  # fmt: skip
    """Fill dx (n, C), dtail (S, W-1, C) and sums (blocks, W+1, C), each block of ROWS rows' dw and dbias.

    dy (n, C) has dy_step elements a row; dfinal (S, W-1, C) and dtail may be empty; the rest as in `forward`.
    """
    reach, columns = len(taps) - 1, (channels + CHANNELS - 1) // CHANNELS
    ring = np.zeros(len(taps) * CHANNELS, np.float32)
    grads = np.zeros(len(taps) * CHANNELS, np.float32)
    spare = (len(taps) + 1) * CHANNELS  # rows from r1 on are needed for dx, but another task sums them
    own = np.zeros(2 * spare, np.float32)
    for task in range(begin_task, end_task):
        r0, c0 = task // columns * ROWS, task % columns * CHANNELS
        r1, width = min(r0 + ROWS, n), min(CHANNELS, channels - c0)
        whole = width - width % LANES
        own[:] = 0
        s, stop = _first_sequence(bounds, r0), r1 + (r1 == n)
        while s < bounds.size - 1 and bounds[s] < stop:
            begin, end = bounds[s], bounds[s + 1]
            a, e = max(begin, r0), min(end, r1)
            for t in range(a - reach, a):
                _input(x, step, tail, t, begin, s, reach, c0, channels, width, ring, _slot(t, taps))
            grads[:] = 0
            for t in range(a, e + reach):
                if t < end:
                    at, dy_at, to = t * step + c0, t * dy_step + c0, 0 if t < e else spare
                    for c in range(0, whole, LANES):
                        prefetch(x, at + AHEAD * step + c)
                        prefetch(dy, dy_at + AHEAD * dy_step + c)
                        _gradient_part(
                            x, at, dy, dy_at, w, bias, ring, grads, own, to, c, c0, channels, t, taps, silu, None
                        )  # fmt: skip
                    if whole < width:
                        _gradient_part(
                            x, at, dy, dy_at, w, bias, ring, grads, own, to, whole, c0, channels, t, taps, silu,
                            first(width - whole),
                        )  # fmt: skip
                else:
                    at = _slot(t, taps)
                    grads[at : at + CHANNELS] = 0
                d = t - reach
                from_final = s * reach + d - end + reach if dfinal.size > 0 and d >= end - reach else -1
                if d >= a:
                    at = d * channels + c0
                    _input_row(grads, w, dfinal, from_final, dx, at, c0, channels, width, d, taps)
                elif a == begin and dtail.size > 0:
                    at = (s * reach + d - begin + reach) * channels + c0
                    _input_row(grads, w, dfinal, from_final, dtail, at, c0, channels, width, d, taps)
            s += 1
        for j in range(len(taps) + 1):
            to = (task // columns * (len(taps) + 1) + j) * channels + c0
            sums[to : to + width] = own[j * CHANNELS : j * CHANNELS + width]
