"""Numba kernels of Mamba-1's selective scan: forward, and a gradient written by hand.

    h_t = e_t h_{t-1} + d_t x_t B_t,   y_t = (sum over n of h_t C_t + D x_t) * silu(z_t),   e_t = exp(d_t A)
    d the step after bias and softplus (dt); g the gradient of h; v the gradient of h_t, later steps included
                                                                            (arXiv 2312.00752, algorithm 2)

The 16 lanes are channels that lie side by side, the rows of a tile are states: what a channel's states share (d, x,
the gate) is one vector, what a token's channels share (B, C) is one number. Time runs in blocks of Q tokens, whose
operands are widened, masked and put into small buffers first; then each tile of states runs over the block's tokens
without leaving the registers.

Backward takes the blocks last to first. For each tile it repeats the block's steps from the state that entered the
block (saved by forward), keeping e_t and h_{t-1} of each, and walks back with them. dB and dC of a task are sums
over its channels, in a fixed order; tasks write to places of their own, so results do not depend on how many threads
share the tasks.

`shape`, nested tuples of zeros, is for its type: that says how many rows a tile has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import first as first_lanes
from plait.ops.numba_support import prefetch
from plait.ops.tile_math import (
    row_read,
    row_write,
    rowwise,
    tile_clip,
    tile_column,
    tile_exp2,
    tile_reciprocal,
    tile_sigmoid,
    tile_zero,
)
from plait.ops.tiles import LANES, tile_dots, tile_load, tile_store

TILES = "e7660550"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
INLINE: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": True}
_ONE, _LOG2_E, _LN2 = np.float32(1), np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_ZERO, _TWO, _HUGE = np.float32(0), np.float32(2), np.float32(3e38)
# 2 atanh(s) / s in powers of s^2, s <= 1/3, from the constant 2 on, fitted for the least relative error (4e-9)
_C1, _C2, _C3, _C4 = (
    np.float32(0.66666317),
    np.float32(0.4002491),
    np.float32(0.27960598),
    np.float32(0.28178418),
)
_ROW = ((0,),)


@njit(**OPTIONS)
def _buffer(count: int) -> Any:
    """Zeros that begin on a cache line: a vector across two costs twice."""
    room = np.zeros(count + LANES, np.float32)
    skip = -(room.ctypes.data // 4) % LANES
    return room[skip : skip + count]


@njit(**INLINE)
def apply_softplus(x: Any) -> Any:
    """log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|; log(1 + u) = 2 atanh(s), s = u / (2 + u) <= 1/3."""
    high = tile_clip(x, _ZERO, _HUGE)
    u = tile_exp2((x - high - high) * _LOG2_E)
    s = u * tile_reciprocal(_TWO + u)
    q = s * s
    return high + s * ((((_C4 * q + _C3) * q + _C2) * q + _C1) * q + _TWO)


@njit(**INLINE)
def _update(r: int, sums: Any, h: Any, a: Any, key: Any, query: Any, d: Any, dx: Any) -> Any:
    """One row of h_t, and y: two sums that take turns, as one would wait for itself."""
    h = tile_exp2(d * a) * h + dx * key
    return h, (sums[1], sums[0] + h * query)


@njit(**INLINE)
def _again(r: int, y: Any, h: Any, a: Any, key: Any, query: Any, d: Any, dx: Any) -> Any:
    """One row of e_t and h_t."""
    e = tile_exp2(d * a)
    h = e * h + dx * key
    return e, h, y + h * query


@njit(**INLINE)
def _back(
    r: int, sums: Any, g: Any, da: Any, a: Any, key: Any, query: Any, e: Any, past: Any, d: Any, dy: Any
) -> Any:
    """One row of v, of what it hands to the step before, and of dA; sums over rows of v B and of the decay's A."""
    v = dy * query + g
    g = v * e
    decay = g * past
    return v, g, da + decay * d, (sums[0] + v * key, sums[1] + decay * a)


@njit(**OPTIONS)
def _transpose(tile: Any, base: int, given: Any, at: int, lanes: int, states: int, factor: Any) -> None:
    """given (channels, N) from `at` on, to rows of states; pads keep what they are."""
    for i in range(lanes):
        for n in range(states):
            tile[base + n * LANES + i] = given[at + i * states + n] * factor


@njit(**OPTIONS)
def _restore(given: Any, at: int, tile: Any, base: int, lanes: int, states: int) -> None:
    """The inverse of `_transpose`."""
    for i in range(lanes):
        for n in range(states):
            given[at + i * states + n] = tile[base + n * LANES + i]


@njit(**OPTIONS)
def _place(block: int, blocks: int, groups: int, channels: int) -> tuple[int, int, int]:
    """The group of a block of channels, its first channel and how many there are (1 to LANES)."""
    per_group = channels // groups
    group = block // (blocks // groups)
    begin = block % (blocks // groups) * LANES
    return group, group * per_group + begin, min(LANES, per_group - begin)


@njit(**OPTIONS)
def forward(
    first, last, shape, sizes, segments, x, x_step, dt, dt_step, z, z_step, b, c,
    decay, skip, bias, initial, softplus, gated, y, final, marks,
):  # fmt: skip
    """Tasks first to last - 1: a sequence and `share` blocks of 16 channels each, which take turns block after block.

    Arrays are flat; *_step are (row, token) strides. sizes (T, E, G, N, N padded to whole tiles, Q, channel blocks,
    share); segments (4, S): row, first token, length, number of the first saved state; b, c (rows, T, G, N padded);
    marks: h entering each block but a sequence's first, in tiles; empty when nothing is to be saved.
    """
    length, channels, groups, states, deep, block, blocks, share = sizes
    rows, area = len(shape), deep * LANES
    parts = (blocks + share - 1) // share
    rates_of, carries = _buffer(share * area), _buffer(share * area)
    ds, dxs, ys = _buffer(block * LANES), _buffer(block * LANES), _buffer(block * LANES)
    for task in range(first, last):
        segment, part = task // parts, task % parts
        row, begin, count, number = segments[:, segment]
        k_first, k_last = part * share, min((part + 1) * share, blocks)
        rates_of[:] = np.float32(0)
        carries[:] = np.float32(0)
        for k in range(k_first, k_last):
            _, e, lanes = _place(k, blocks, groups, channels)
            base = (k - k_first) * area
            _transpose(rates_of, base, decay, e * states, lanes, states, _LOG2_E)
            if initial.size > 0:
                _transpose(carries, base, initial, (segment * channels + e) * states, lanes, states, _ONE)
        for t0 in range(0, count, block):
            many = min(block, count - t0)
            for k in range(k_first, k_last):
                group, e, lanes = _place(k, blocks, groups, channels)
                mask, base = first_lanes(lanes), (k - k_first) * area
                through, offset = row_read(skip, e, mask), row_read(bias, e, mask)
                # what comes next: these tokens' next channels or, after the last, the next tokens' first
                tokens_on, channels_on = (0, LANES) if k + 1 < k_last else (block, (k_first - k) * LANES)
                if marks.size > 0 and t0 > 0:
                    saved = ((number + t0 // block - 1) * blocks + k) * area
                    marks[saved : saved + area] = carries[base : base + area]
                for t in range(many):
                    token, at = begin + t0 + t, t * LANES
                    of_x, of_dt = (
                        row * x_step[0] + token * x_step[1] + e,
                        row * dt_step[0] + token * dt_step[1] + e,
                    )
                    u, d = row_read(x, of_x, mask), row_read(dt, of_dt, mask) + offset
                    if softplus:
                        d = apply_softplus(d)
                    row_write(ds, at, d, None)
                    row_write(dxs, at, d * u, None)
                    row_write(ys, at, through * u, None)
                for n in range(0, deep, rows):
                    rates = tile_load(shape, rates_of, base + n * LANES, LANES)
                    h = tile_load(shape, carries, base + n * LANES, LANES)
                    for t in range(many):
                        at, of = t * LANES, ((row * length + begin + t0 + t) * groups + group) * deep + n
                        if (
                            n == 0
                        ):  # a few lines with each token: many at once would have to wait for each other
                            token, ahead = begin + t0 + t + tokens_on, e + channels_on
                            prefetch(x, row * x_step[0] + token * x_step[1] + ahead)
                            prefetch(dt, row * dt_step[0] + token * dt_step[1] + ahead)
                            prefetch(y, (row * length + token) * channels + ahead)
                            if gated:
                                prefetch(z, row * z_step[0] + token * z_step[1] + ahead)
                        key, query = tile_column(shape, b, of), tile_column(shape, c, of)
                        sums = (row_read(ys, at, None), tile_zero(_ROW))
                        d, dx = row_read(ds, at, None), row_read(dxs, at, None)
                        h, sums = rowwise(_update, sums, h, rates, key, query, d, dx)
                        row_write(ys, at, sums[0] + sums[1], None)
                    tile_store(carries, base + n * LANES, LANES, h)
                for t in range(many):
                    token = begin + t0 + t
                    out = row_read(ys, t * LANES, None)
                    if gated:
                        of_z = row * z_step[0] + token * z_step[1] + e
                        gate = row_read(z, of_z, mask)
                        out = out * (gate * tile_sigmoid(gate))
                    row_write(y, (row * length + token) * channels + e, out, mask)
        for k in range(k_first, k_last):
            _, e, lanes = _place(k, blocks, groups, channels)
            _restore(final, (segment * channels + e) * states, carries, (k - k_first) * area, lanes, states)


@njit(**OPTIONS)
def backward(
    first, last, shape, sizes, segments, x, x_step, dt, dt_step, z, z_step, dy, dy_step, b, c,
    decay, skip, bias, initial, dfinal, marks, softplus, gated,
    dx, ddt, dz, db, dc, da, dinitial, sums,
):  # fmt: skip
    """The gradient, tasks first to last - 1: a sequence and `share` channel blocks of a group each; see `forward`.

    sizes: as forward's, then share and tasks a group; db, dc (tasks a group, rows, T, G, N padded): one summand for
    each; da (S, E, N); sums (S, 2, E): of each sequence the gradients of D and of dt_bias.
    """
    length, channels, groups, states, deep, block, blocks, share, parts = sizes
    rows, area = len(shape), deep * LANES
    tokens = db.size // max(parts * groups * deep, 1)
    enter, rates_of = _buffer(area), _buffer(share * area)
    carries, das = _buffer(share * area), _buffer(share * area)
    kept_e, kept_h = _buffer(block * rows * LANES), _buffer(block * rows * LANES)
    ds, us, dxs, slopes = (
        _buffer(block * LANES), _buffer(block * LANES), _buffer(block * LANES), _buffer(block * LANES)
    )  # fmt: skip
    dys, gates, ys, to_u, to_d = (
        _buffer(block * LANES), _buffer(block * LANES), _buffer(block * LANES), _buffer(block * LANES),
        _buffer(block * LANES),
    )  # fmt: skip
    db_sum, dc_sum = _buffer(block * deep + LANES), _buffer(block * deep + LANES)
    nothing = tile_zero(_ROW)
    for task in range(first, last):
        segment, part = task // (groups * parts), task % parts
        group = task // parts % groups
        row, begin, count, number = segments[:, segment]
        per_group = blocks // groups
        k_first = group * per_group + part * share
        k_last = min(k_first + share, (group + 1) * per_group)
        rates_of[:] = np.float32(0)
        carries[:] = np.float32(0)
        das[:] = np.float32(0)
        for k in range(k_first, k_last):
            _, e, lanes = _place(k, blocks, groups, channels)
            base = (k - k_first) * area
            _transpose(rates_of, base, decay, e * states, lanes, states, _LOG2_E)
            if dfinal.size > 0:
                _transpose(carries, base, dfinal, (segment * channels + e) * states, lanes, states, _ONE)
        for block_number in range((count + block - 1) // block - 1, -1, -1):
            t0 = block_number * block
            many = min(block, count - t0)
            db_sum[:] = np.float32(0)
            dc_sum[:] = np.float32(0)
            for k in range(k_first, k_last):
                _, e, lanes = _place(k, blocks, groups, channels)
                mask = first_lanes(lanes)
                # what comes next, as in forward; the block of tokens before this one is whole
                tokens_on, channels_on = (0, LANES) if k + 1 < k_last else (-block, (k_first - k) * LANES)
                enter[:] = np.float32(0)
                if block_number > 0:
                    saved = ((number + block_number - 1) * blocks + k) * area
                    enter[:] = marks[saved : saved + area]
                elif initial.size > 0:
                    _transpose(enter, 0, initial, (segment * channels + e) * states, lanes, states, _ONE)
                through, offset = row_read(skip, e, mask), row_read(bias, e, mask)
                of_skip, of_bias = (segment * 2) * channels + e, (segment * 2 + 1) * channels + e
                dskip = row_read(sums, of_skip, mask)
                for t in range(many):
                    token, at = begin + t0 + t, t * LANES
                    of_x, of_dt = (
                        row * x_step[0] + token * x_step[1] + e,
                        row * dt_step[0] + token * dt_step[1] + e,
                    )
                    of_dy = row * dy_step[0] + token * dy_step[1] + e
                    u, d, grad = (
                        row_read(x, of_x, mask),
                        row_read(dt, of_dt, mask) + offset,
                        row_read(dy, of_dy, mask),
                    )
                    if softplus:
                        row_write(slopes, at, tile_sigmoid(d), None)
                        d = apply_softplus(d)
                    if gated:
                        of_z = row * z_step[0] + token * z_step[1] + e
                        gate = row_read(z, of_z, mask)
                        open_ = tile_sigmoid(gate)
                        row_write(gates, at, grad * (open_ * (_ONE + gate * (_ONE - open_))), None)
                        grad = grad * (gate * open_)
                    dskip = dskip + grad * u
                    row_write(ds, at, d, None)
                    row_write(us, at, u, None)
                    row_write(dxs, at, d * u, None)
                    row_write(dys, at, grad, None)
                    row_write(ys, at, through * u, None)
                    row_write(to_u, at, nothing, None)
                    row_write(to_d, at, nothing, None)
                row_write(sums, of_skip, dskip, mask)
                for n in range(0, deep, rows):
                    base = (k - k_first) * area + n * LANES
                    rates, h = (
                        tile_load(shape, rates_of, base, LANES),
                        tile_load(shape, enter, n * LANES, LANES),
                    )
                    for t in range(many):
                        at, of = t * LANES, ((row * length + begin + t0 + t) * groups + group) * deep + n
                        if n == 0:
                            token, ahead = begin + t0 + t + tokens_on, e + channels_on
                            prefetch(x, row * x_step[0] + token * x_step[1] + ahead)
                            prefetch(dt, row * dt_step[0] + token * dt_step[1] + ahead)
                            prefetch(dy, row * dy_step[0] + token * dy_step[1] + ahead)
                            if gated:
                                prefetch(z, row * z_step[0] + token * z_step[1] + ahead)
                        key, query = tile_column(shape, b, of), tile_column(shape, c, of)
                        tile_store(kept_h, at * rows, LANES, h)
                        out, d, dx_t = row_read(ys, at, None), row_read(ds, at, None), row_read(dxs, at, None)
                        decays, h, out = rowwise(_again, out, h, rates, key, query, d, dx_t)
                        tile_store(kept_e, at * rows, LANES, decays)
                        row_write(ys, at, out, None)
                        tile_dots(dc_sum, t * deep + n, h, row_read(dys, at, None))
                    g, da_tile = tile_load(shape, carries, base, LANES), tile_load(shape, das, base, LANES)
                    for t in range(many - 1, -1, -1):
                        at, of = t * LANES, ((row * length + begin + t0 + t) * groups + group) * deep + n
                        if n == 0:
                            target = (row * length + begin + t0 + t) * channels + e
                            prefetch(dx, target)
                            prefetch(ddt, target)
                            if gated:
                                prefetch(dz, target)
                        key, query = tile_column(shape, b, of), tile_column(shape, c, of)
                        decays, past = (
                            tile_load(shape, kept_e, at * rows, LANES),
                            tile_load(shape, kept_h, at * rows, LANES),
                        )
                        both = (row_read(to_u, at, None), row_read(to_d, at, None))
                        d, grad = row_read(ds, at, None), row_read(dys, at, None)
                        v, g, da_tile, both = rowwise(
                            _back, both, g, da_tile, rates, key, query, decays, past, d, grad
                        )
                        tile_dots(db_sum, t * deep + n, v, row_read(dxs, at, None))
                        row_write(to_u, at, both[0], None)
                        row_write(to_d, at, both[1], None)
                    tile_store(carries, base, LANES, g)
                    tile_store(das, base, LANES, da_tile)
                dbias = row_read(sums, of_bias, mask)
                for t in range(many):
                    token, at = begin + t0 + t, t * LANES
                    target = (row * length + token) * channels + e
                    d, u, along = row_read(ds, at, None), row_read(us, at, None), row_read(to_u, at, None)
                    row_write(dx, target, along * d + through * row_read(dys, at, None), mask)
                    grad = row_read(to_d, at, None) * _LN2 + along * u
                    if softplus:
                        grad = grad * row_read(slopes, at, None)
                    dbias = dbias + grad
                    row_write(ddt, target, grad, mask)
                    if gated:
                        row_write(dz, target, row_read(gates, at, None) * row_read(ys, at, None), mask)
                row_write(sums, of_bias, dbias, mask)
            for t in range(many):
                at = ((part * tokens + row * length + begin + t0 + t) * groups + group) * deep
                db[at : at + deep] = db_sum[t * deep : (t + 1) * deep]
                dc[at : at + deep] = dc_sum[t * deep : (t + 1) * deep]
        for k in range(k_first, k_last):
            _, e, lanes = _place(k, blocks, groups, channels)
            at, base = (segment * channels + e) * states, (k - k_first) * area
            _restore(da, at, das, base, lanes, states)
            _restore(dinitial, at, carries, base, lanes, states)
