"""Numba kernels of Mamba-2's recurrence: forward, and a gradient written by hand.

    S_t = g_t S_{t-1} + x_t (d_t B_t)^T,   y_t = S_t C_t + D x_t,   g_t = exp(d_t A)        (arXiv 2405.21060)
    d the step after bias, softplus and limits (dt); dS the gradient of S

A task is one sequence and one or more heads of a group; time runs in blocks of Q tokens. A block's operands are
copied to padded float32 buffers, and a tile of the state, `rows` head channels by some vectors of 16 lanes along N,
stays in registers over the block's tokens. Tasks write to places of their own and add in a fixed order, so results
do not depend on how many threads share the tasks.

Backward takes the blocks last to first. For each tile it repeats the block's steps from the state that entered the
block (saved by forward), which gives dC, and then walks back with dS, a few steps at a time: those forward once more,
keeping g_t S_{t-1} of each, then back. The decay's gradient is the inner product of dS_t and g_t S_{t-1} itself:
nothing cancels, however strong the decay.

Pads of buffers are zeros and stay so; those of states are cleared for every sequence, as a NaN of the sequence before
would live on in them.

`shape`, nested tuples of zeros, is for its type: that says how many rows and vectors a tile has.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from plait.ops.tiles import (
    LANES,
    copy,
    get,
    lane_sum,
    prefetch,
    put,
    row_load,
    tile_dots,
    tile_inner,
    tile_load,
    tile_mix,
    tile_outer,
    tile_scale,
    tile_store,
)

TILES = "a7eef87f"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
SHORT = 8
"""steps whose g_t S_{t-1} backward keeps at a time: they fit the first cache"""
AHEAD = 12
"""rows, for software prefetch: a head's rows lie too far apart for the processor's own"""
_ONE = ((0,),)


@njit(**OPTIONS)
def _buffer(count: int) -> Any:
    """Zeros that begin on a cache line: a vector across two costs twice."""
    room = np.zeros(count + LANES, np.float32)
    skip = -(room.ctypes.data // 4) % LANES
    return room[skip : skip + count]


@njit(**OPTIONS)
def _up(count: int, step: int) -> int:
    return (count + step - 1) // step * step


@njit(**OPTIONS)
def _begin(state: Any, base: int, area: int, given: Any, at: int, width: int, size: int, long: int) -> None:
    """Fill a padded state with `given` (P, N) from `at` on, or with zeros if `given` is empty."""
    for i in range(base, base + area):
        put(state, i, np.float32(0))
    if given.size > 0:
        for p in range(width):
            copy(state, base + p * long, given, at + p * size, size, np.float32(1))


@njit(**OPTIONS)
def _task_heads(part: int, heads: int, groups: int, share: int) -> tuple[int, int, int]:
    """The group of a task, its first head and the one after its last."""
    per_group = heads // groups
    parts = (per_group + share - 1) // share
    group = part // parts
    head = group * per_group + part % parts * share
    return group, head, min(head + share, (group + 1) * per_group)


@njit(**OPTIONS)
def forward(
    first, last, shape, sizes, segments, x, x_step, dt, dt_step, b, b_step, c, c_step,
    decay, bias, skip, initial, low, high, softplus, y, final, steps, gates, states,
):  # fmt: skip
    """Tasks first to last - 1. Arrays are flat; *_step are (row, token, head or group) strides of the inputs.

    sizes (T, H, P, G, N, heads a task, Q, tasks a sequence); segments (4, S): row, first token, length, number of
    the first saved state; steps, gates (tokens, H): d before its limits and exp(d A); states: S entering each block
    but a sequence's first, padded; empty when nothing is to be saved.
    """
    length, heads, width, groups, size, share, block, parts = sizes
    rows, lanes = len(shape), LANES * len(shape[0])
    wide, deep, long = _up(width, LANES), _up(width, rows), _up(size, lanes)
    one = np.float32(1)
    area = deep * long
    state = _buffer(area)
    xs, ys = _buffer(block * wide), _buffer(block * wide)
    bs, cs = _buffer(block * long), _buffer(block * long)
    ds, gs = _buffer(block), _buffer(block)
    for task in range(first, last):
        segment = task // parts
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = _task_heads(task % parts, heads, groups, share)
        for head in range(head_begin, head_end):
            outer = (segment * heads + head) * width * size
            _begin(state, 0, area, initial, outer, width, size, long)
            for t0 in range(0, count, block):
                many = min(block, count - t0)
                if states.size > 0 and t0 > 0:
                    saved = ((number + t0 // block - 1) * heads + head) * area
                    copy(states, saved, state, 0, area, one)
                for t in range(many):
                    token = begin + t0 + t
                    d = dt[row * dt_step[0] + token * dt_step[1] + head * dt_step[2]] + bias[head]
                    if softplus and d <= np.float32(20):
                        d = np.float32(math.log1p(math.exp(d)))
                    at = (row * length + token) * heads + head
                    steps[at] = d
                    d = low if d < low else d
                    ds[t] = high if d > high else d
                    gs[t] = np.float32(math.exp(ds[t] * decay[head]))
                    gates[at] = gs[t]
                    source = row * x_step[0] + token * x_step[1] + head * x_step[2]
                    prefetch(x, source + AHEAD * x_step[1], width)
                    copy(xs, t * wide, x, source, width, one)
                    prefetch(y, at * width, width)
                    source = row * b_step[0] + token * b_step[1] + group * b_step[2]
                    copy(bs, t * long, b, source, size, ds[t])
                    source = row * c_step[0] + token * c_step[1] + group * c_step[2]
                    copy(cs, t * long, c, source, size, one)
                ys[: many * wide] = np.float32(0)
                for n in range(0, long, lanes):
                    for p in range(0, deep, rows):
                        tile = tile_load(shape, state, p * long + n, long)
                        for t in range(many):
                            key, query = row_load(shape, bs, t * long + n), row_load(shape, cs, t * long + n)
                            tile = tile_outer(tile_scale(get(gs, t), tile), xs, t * wide + p, key)
                            tile_dots(ys, t * wide + p, tile, query)
                        tile_store(state, p * long + n, long, tile)
                for t in range(many):
                    target = ((row * length + begin + t0 + t) * heads + head) * width
                    for p in range(width):
                        through = get(skip, head * width + p) * get(xs, t * wide + p)
                        put(y, target + p, get(ys, t * wide + p) + through)
            for p in range(width):
                copy(final, outer + p * size, state, p * long, size, one)


@njit(**OPTIONS)
def backward(
    first, last, shape, sizes, segments, x, x_step, dy, dy_step, b, b_step, c, c_step,
    decay, skip, initial, dfinal, low, high, softplus, steps, gates, states,
    dx, ddt, db, dc, dinitial, sums,
):  # fmt: skip
    """The gradient, tasks first to last - 1; see `forward`.

    db, dc (parts of a group, tokens, G, N): one summand for each task of the same group; sums (S, H, P + 2) float64:
    of each sequence the gradient of D, of A and of dt_bias.
    """
    length, heads, width, groups, size, share, block, parts = sizes
    rows, lanes = len(shape), LANES * len(shape[0])
    wide, deep, long = _up(width, LANES), _up(width, rows), _up(size, lanes)
    one = np.float32(1)
    area, tile_area = deep * long, rows * lanes
    tokens = db.size // max(parts // groups * groups * size, 1)
    dstate, enter = _buffer(share * area), _buffer(area)
    kept, marks = _buffer(SHORT * tile_area), _buffer((block + SHORT - 1) // SHORT * tile_area)
    xs, dys, dxs = (
        _buffer(block * wide), _buffer(block * wide), _buffer(block * wide)
    )  # fmt: skip
    raw, bs, cs = (
        _buffer(block * long), _buffer(block * long), _buffer(block * long)
    )  # fmt: skip
    dbs, db_sum, dc_sum = (
        _buffer(block * long), _buffer(block * long), _buffer(block * long)
    )  # fmt: skip
    ds, gs = _buffer(block), _buffer(block)
    das, dds = _buffer(block * LANES), _buffer(block * LANES)
    dskip = _buffer(wide)
    for task in range(first, last):
        segment = task // parts
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = _task_heads(task % parts, heads, groups, share)
        part = task % parts % (parts // groups)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            _begin(dstate, base, area, dfinal, outer, width, size, long)
            sums[(segment * heads + head) * (width + 2) : (segment * heads + head + 1) * (width + 2)] = 0.0
        for k in range((count + block - 1) // block - 1, -1, -1):
            t0 = k * block
            many = min(block, count - t0)
            db_sum[: many * long] = np.float32(0)
            dc_sum[: many * long] = np.float32(0)
            for t in range(many):
                token = begin + t0 + t
                copy(raw, t * long, b, row * b_step[0] + token * b_step[1] + group * b_step[2], size, one)
                copy(cs, t * long, c, row * c_step[0] + token * c_step[1] + group * c_step[2], size, one)
            for head in range(head_begin, head_end):
                outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
                if k > 0:
                    copy(enter, 0, states, ((number + k - 1) * heads + head) * area, area, one)
                else:
                    _begin(enter, 0, area, initial, outer, width, size, long)
                for t in range(many):
                    token = begin + t0 + t
                    at = (row * length + token) * heads + head
                    gs[t] = gates[at]
                    d = steps[at]
                    d = low if d < low else d
                    ds[t] = high if d > high else d
                    copy(bs, t * long, raw, t * long, size, ds[t])
                    source = row * x_step[0] + token * x_step[1] + head * x_step[2]
                    prefetch(x, source + AHEAD * x_step[1], width)
                    copy(xs, t * wide, x, source, width, one)
                    prefetch(dx, at * width, width)
                    source = row * dy_step[0] + token * dy_step[1] + head * dy_step[2]
                    prefetch(dy, source + AHEAD * dy_step[1], width)
                    copy(dys, t * wide, dy, source, width, one)
                dxs[: many * wide] = np.float32(0)
                dbs[: many * long] = np.float32(0)
                das[: many * LANES] = np.float32(0)
                dds[: many * LANES] = np.float32(0)
                for n in range(0, long, lanes):
                    for p in range(0, deep, rows):
                        tile = tile_load(shape, enter, p * long + n, long)
                        for u in range(0, many, SHORT):
                            tile_store(marks, u // SHORT * tile_area, lanes, tile)
                            for t in range(u, min(u + SHORT, many)):
                                key = row_load(shape, bs, t * long + n)
                                tile = tile_outer(tile_scale(get(gs, t), tile), xs, t * wide + p, key)
                                total = row_load(shape, dc_sum, t * long + n)
                                tile_store(dc_sum, t * long + n, 0, tile_mix(total, dys, t * wide + p, tile))
                        dtile = tile_load(shape, dstate, base + p * long + n, long)
                        for u in range((many - 1) // SHORT * SHORT, -1, -SHORT):
                            end = min(u + SHORT, many)
                            tile = tile_load(shape, marks, u // SHORT * tile_area, lanes)
                            for t in range(u, end):
                                tile = tile_scale(get(gs, t), tile)
                                tile_store(kept, (t - u) * tile_area, lanes, tile)
                                tile = tile_outer(tile, xs, t * wide + p, row_load(shape, bs, t * long + n))
                            for t in range(end - 1, u - 1, -1):
                                dtile = tile_outer(
                                    dtile, dys, t * wide + p, row_load(shape, cs, t * long + n)
                                )
                                total = row_load(shape, dbs, t * long + n)
                                tile_store(dbs, t * long + n, 0, tile_mix(total, xs, t * wide + p, dtile))
                                tile_dots(dxs, t * wide + p, dtile, row_load(shape, bs, t * long + n))
                                past = tile_load(shape, kept, (t - u) * tile_area, lanes)
                                tile_inner(das, t * LANES, dtile, past)
                                dtile = tile_scale(get(gs, t), dtile)
                        tile_store(dstate, base + p * long + n, long, dtile)
                # from here on one token costs P + N
                dskip[:] = np.float32(0)
                dA = dbias = 0.0
                for t in range(many):
                    token = row * length + begin + t0 + t
                    at = token * heads + head
                    for n in range(0, long, LANES):
                        key, grad = row_load(_ONE, raw, t * long + n), row_load(_ONE, dbs, t * long + n)
                        tile_inner(dds, t * LANES, key, grad)
                        total = tile_outer(row_load(_ONE, db_sum, t * long + n), ds, t, grad)
                        tile_store(db_sum, t * long + n, 0, total)
                    for p in range(0, wide, LANES):
                        at_p = t * wide + p
                        tile_inner(dskip, p, row_load(_ONE, dys, at_p), row_load(_ONE, xs, at_p))
                    da, dd = lane_sum(das, t * LANES), lane_sum(dds, t * LANES)
                    for p in range(width):
                        through = get(skip, head * width + p) * get(dys, t * wide + p)
                        put(dx, at * width + p, get(dxs, t * wide + p) + through)
                    dA += np.float64(da) * ds[t]
                    dd += da * decay[head]
                    d = steps[at]
                    if d < low or d > high:
                        dd = np.float32(0)
                    if softplus:
                        dd *= np.float32(-math.expm1(-d))
                    ddt[at] = dd
                    dbias += dd
                base = (segment * heads + head) * (width + 2)
                for p in range(width):
                    sums[base + p] += dskip[p]
                sums[base + width] += dA
                sums[base + width + 1] += dbias
            for t in range(many):
                token = row * length + begin + t0 + t
                target = ((part * tokens + token) * groups + group) * size
                copy(db, target, db_sum, t * long, size, one)
                copy(dc, target, dc_sum, t * long, size, one)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            for p in range(width):
                copy(dinitial, outer + p * size, dstate, base + p * long, size, one)
