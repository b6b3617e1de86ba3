"""The Numba kernel of one new token of Mamba-1's recurrence.

    d = softplus(sum over r of U_er dt_r + b_e);   h_en <- exp(d_e A_en) h_en + d_e x_e B_n
    y_e = (sum over n of h_en C_n + D_e x_e) silu(z_e)

A task is a sequence and some channels; the lanes are states, as they lie in memory, and eight channels are in
registers at once. Inputs are float32 or bfloat16; the state, A, D and b are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.causal_conv1d_update.cpu_kernels import silu
from plait.ops.norm_linear.cpu_kernels import narrowed, products, widen
from plait.ops.numba_support import PIECE
from plait.ops.numba_support import first as first_lanes
from plait.ops.numba_team import Kernel, floats, halves, integers
from plait.ops.selective_scan.cpu_kernels import apply_softplus
from plait.ops.tile_math import row_read, row_write, rowwise, tile_exp2, tile_zero
from plait.ops.tiles import LANES, tile_dots

TILES = "879c68f4"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
CHANNELS = 4 * LANES
"""of a task"""
_LOG2_E, _ZERO = np.float32(1.4426950408889634), np.float32(0)
_ALONE, _EIGHT = ((0,),), ((0,),) * 8


@njit(**PIECE)
def _update(
    r: int, carry: int, sums: Any, key: Any, query: Any, state: Any, rates: Any, at: int, of_a: int, step: int,
    d: Any, dx: Any, c: int, lanes: Any,
) -> Any:  # fmt: skip
    """Some states of channel c + r, and what they add to its y."""
    a, h = row_read(rates, of_a + r * step, lanes), row_read(state, at + r * step, lanes)
    h = tile_exp2(a * d[c + r]) * h + key * dx[c + r]
    row_write(state, at + r * step, h, lanes)
    return sums + h * query, carry


@njit(**PIECE)
def _channels(
    shape: Any, state: Any, rates: Any, at: int, of_a: int, states: int, keys: Any, queries: Any, d: Any, dx: Any,
    c: int, out: Any,
) -> None:  # fmt: skip
    """out[LANES + c + r] += h C of as many channels as the shape has rows."""
    sums = tile_zero(shape)
    whole = states - states % LANES
    for n in range(0, whole, LANES):
        key, query = row_read(keys, n, None), row_read(queries, n, None)
        sums, _ = rowwise(
            _update, 0, sums, key, query, state, rates, at + n, of_a + n, states, d, dx, c, None
        )
    if whole < states:
        key, query = row_read(keys, whole, None), row_read(queries, whole, None)
        lanes = first_lanes(states - whole)
        sums, _ = rowwise(
            _update, 0, sums, key, query, state, rates, at + whole, of_a + whole, states, d, dx, c, lanes
        )
    tile_dots(out, LANES + c, sums, row_read(out, 0, None))


def _step(first: Any, last: Any, words: Any) -> None:
    """Tasks first to last - 1; the words are those of `cpu.py`."""
    p = integers(words)
    channels, states, rank = p[0], p[1], p[2]
    blocks, padded = (channels + CHANNELS - 1) // CHANNELS, states + LANES
    long = (rank + LANES - 1) // LANES * LANES
    rates, h = floats(p[12]), floats(p[24])
    keys, queries, low = (
        np.zeros(padded, np.float32),
        np.zeros(padded, np.float32),
        np.zeros(long, np.float32),
    )
    x, d, dx, gates = (
        np.zeros(CHANNELS, np.float32),
        np.zeros(CHANNELS, np.float32),
        np.zeros(CHANNELS, np.float32),
        np.zeros(CHANNELS, np.float32),
    )
    out = np.ones(LANES + CHANNELS, np.float32)
    for task in range(first, last):
        row, e = task // blocks, task % blocks * CHANNELS
        count = min(CHANNELS, channels - e)
        widen(keys, 0, p[13], p[14], row * p[15], states)
        widen(queries, 0, p[16], p[17], row * p[18], states)
        widen(x, 0, p[3], p[4], row * p[5] + e, count)
        if rank > 0:
            widen(low, 0, p[6], p[7], row * p[8], rank)
            if p[23]:
                products(halves(p[22]), e * rank, rank, count, rank, low, long, 1, out, CHANNELS)
            else:
                products(floats(p[22]), e * rank, rank, count, rank, low, long, 1, out, CHANNELS)
            d[:] = out[LANES:]
        else:
            widen(d, 0, p[6], p[7], row * p[8] + e, count)
        if p[20] != 0:
            bias = floats(p[20])
            for c in range(count):
                d[c] += bias[e + c]
        if p[21]:
            for c in range(0, count, LANES):
                row_write(d, c, apply_softplus(row_read(d, c, None)), None)
        for c in range(count):
            dx[c] = d[c] * x[c]
            d[c] *= _LOG2_E
        out[LANES:] = _ZERO
        at, of_a = (row * channels + e) * states, e * states
        for c in range(0, count - 7, 8):
            _channels(
                _EIGHT, h, rates, at + c * states, of_a + c * states, states, keys, queries, d, dx, c, out
            )
        for c in range(count - count % 8, count):
            _channels(
                _ALONE, h, rates, at + c * states, of_a + c * states, states, keys, queries, d, dx, c, out
            )
        if p[19] != 0:
            skip = floats(p[19])
            for c in range(count):
                out[LANES + c] += skip[e + c] * x[c]
        if p[9] != 0:
            widen(gates, 0, p[9], p[10], row * p[11] + e, count)
            silu(gates, 0, count)
            for c in range(count):
                out[LANES + c] *= gates[c]
        narrowed(p[25], p[26], row * channels + e, out, LANES, count)


STEP = Kernel("selective_state_update_cpu", _step)
