"""The Numba kernel of one new token of Mamba-2's recurrence, after its convolution.

    d = clamp(softplus(dt + b));   S_pn <- exp(d A) S_pn + d x_p B_n;   u_p = (sum over n of S_pn C_n + D x_p) silu(z_p)

A task is a sequence and a head; the lanes are states, as they lie in memory, and eight of the head's channels are in
registers at once. z and dt are float32 or bfloat16, the rest is float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from plait.ops.causal_conv1d_update.cpu_kernels import silu
from plait.ops.norm_linear.cpu_kernels import narrowed, widen
from plait.ops.numba_support import PIECE, prefetch
from plait.ops.numba_support import first as first_lanes
from plait.ops.numba_team import Kernel, doubles, floats, integers
from plait.ops.tile_math import row_read, row_write, rowwise, tile_zero
from plait.ops.tiles import LANES, copy, tile_dots

TILES = "1d4c0f39"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
_ONE, _ZERO = np.float32(1), np.float32(0)
_TINY = np.float32(1e-37)
"""A decay below it is 0: denormal numbers cost a processor a hundred times the normal ones."""
_ALONE, _EIGHT = ((0,),), ((0,),) * 8


@njit(**PIECE)
def _update(
    r: int, carry: int, sums: Any, key: Any, query: Any, state: Any, at: int, step: int, decay: Any, dx: Any, p: int,
    lanes: Any,
) -> Any:  # fmt: skip
    """Some states of the head's channel p + r, and what they add to its u."""
    prefetch(state, at + (r + 8) * step)
    S = row_read(state, at + r * step, lanes) * decay + key * dx[p + r]
    row_write(state, at + r * step, S, lanes)
    return sums + S * query, carry


@njit(**PIECE)
def _channels(
    shape: Any, state: Any, at: int, states: int, keys: Any, queries: Any, decay: Any, dx: Any, p: int, out: Any
) -> None:  # fmt: skip
    """out[LANES + p + r] += S C of as many channels as the shape has rows."""
    sums = tile_zero(shape)
    whole = states - states % LANES
    for n in range(0, whole, LANES):
        key, query = row_read(keys, n, None), row_read(queries, n, None)
        sums, _ = rowwise(_update, 0, sums, key, query, state, at + n, states, decay, dx, p, None)
    if whole < states:
        key, query = row_read(keys, whole, None), row_read(queries, whole, None)
        lanes = first_lanes(states - whole)
        sums, _ = rowwise(_update, 0, sums, key, query, state, at + whole, states, decay, dx, p, lanes)
    tile_dots(out, LANES + p, sums, row_read(out, 0, None))


def _step(first: Any, last: Any, words: Any) -> None:
    """Tasks first to last - 1; the words are those of `cpu.py`."""
    w, numbers = integers(words), doubles(words)
    heads, width, states, groups, channels = w[0], w[1], w[2], w[3], w[4]
    padded = (width + LANES - 1) // LANES * LANES
    mixed, rates, state = floats(w[5]), floats(w[12]), floats(w[18])
    keys, queries = np.zeros(states + LANES, np.float32), np.zeros(states + LANES, np.float32)
    dx, gates, step = np.zeros(padded, np.float32), np.zeros(padded, np.float32), np.zeros(LANES, np.float32)
    out = np.ones(LANES + padded, np.float32)
    for task in range(first, last):
        row, head = task // heads, task % heads
        group, x = head // (heads // groups), row * channels + head * width
        key = row * channels + heads * width + group * states
        copy(keys, 0, mixed, key, states, _ONE)
        copy(queries, 0, mixed, key + groups * states, states, _ONE)
        widen(step, 0, w[9], w[10], row * w[11] + head, 1)
        d = np.float64(step[0])
        if w[15] != 0:
            d += np.float64(floats(w[15])[head])
        d = max(d, 0.0) + math.log1p(math.exp(-abs(d)))
        d = min(max(d, numbers[16]), numbers[17])
        decay = np.float32(math.exp(d * np.float64(rates[head])))
        if decay < _TINY:
            decay = _ZERO
        for p in range(width):
            dx[p] = np.float32(d) * mixed[x + p]
        out[LANES:] = _ZERO
        at = (row * heads + head) * width * states
        for p in range(0, width - 7, 8):
            _channels(_EIGHT, state, at + p * states, states, keys, queries, decay, dx, p, out)
        for p in range(width - width % 8, width):
            _channels(_ALONE, state, at + p * states, states, keys, queries, decay, dx, p, out)
        if w[13] != 0:
            skip = floats(w[13])
            for p in range(width):
                out[LANES + p] += skip[(head * width + p) if w[14] else head] * mixed[x + p]
        if w[6] != 0:
            widen(gates, 0, w[6], w[7], row * w[8] + head * width, width)
            silu(gates, 0, width)
            for p in range(width):
                out[LANES + p] *= gates[p]
        narrowed(w[19], w[20], (row * heads + head) * width, out, LANES, width)


STEP = Kernel("ssd_update_cpu", _step)
