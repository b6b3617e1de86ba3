"""Numba kernels of a time-invariant diagonal state-space model: forward, and a gradient written by hand.

    h_t = p h_{t-1} + b x_t,   y_t = sum over n of <c, h_t> + D x_t                         (S4D, arXiv 2206.11893)
    p = exp(dA); complex numbers are pairs, and <c, h> = c_re h_re + c_im h_im: c is (2 Re C, -2 Im C)
    v the gradient of h_t, later steps included;   dp = the sum over t of v_t conj(h_{t-1})

The 16 lanes are channels that lie side by side, the rows of a tile are states. A task is 16 channels and some
sequences; time runs in blocks of Q tokens, and each tile of states runs over a block's tokens in registers.

What float32 rounds of p, `rest` of it in proportion, would count at each of the steps that a state is remembered: at
a block's end the state is multiplied by (p / float32(p))^Q, so that it counts for one block only.

Backward takes the blocks last to first: for each tile it repeats the block's steps from the state that entered it
(saved by forward), keeping h_{t-1} of each, and walks back with them. Tasks write to places of their own and add in a
fixed order, so results do not depend on how many threads share the tasks.

`shape`, nested tuples of zeros, is for its type: the rows of a tile. `turning` is None for real states, True for
complex ones, for its type too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import first as first_lanes
from plait.ops.numba_support import prefetch
from plait.ops.tile_math import row_read, row_write, rowwise, tile_zero
from plait.ops.tiles import LANES, tile_load, tile_store

TILES = "e7660550"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
INLINE: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": True}
BLOCK = 32
"""Q, tokens a block: one state a block is kept for backward"""
AHEAD = 8
"""tokens, for software prefetch: a channel block's rows lie too far apart for the processor's own"""
_ZERO, _ONE = np.float32(0), np.float32(1)
_ROW = ((0,),)


@njit(**OPTIONS)
def _buffer(count: int) -> Any:
    """Zeros that begin on a cache line."""
    room = np.zeros(count + LANES, np.float32)
    skip = -(room.ctypes.data // 4) % LANES
    return room[skip : skip + count]


@njit(**INLINE)
def _decayed(r: int, y: Any, h: Any, p: Any, b: Any, c: Any, x: Any) -> Any:
    """One row of h_t, real, and y."""
    h = p * h + b * x
    return h, y + c * h


@njit(**INLINE)
def _turned(r: int, y: Any, h: Any, i: Any, p: Any, pi: Any, b: Any, bi: Any, c: Any, ci: Any, x: Any) -> Any:
    """One row of h_t, complex (h, i), and y."""
    real = p * h + (b * x - pi * i)
    i = p * i + (bi * x + pi * h)
    return real, i, y + c * real + ci * i


@njit(**INLINE)
def _back(
    r: int, dx: Any, v: Any, dp: Any, db: Any, past: Any, p: Any, b: Any, c: Any, x: Any, dy: Any
) -> Any:
    """One row of what v_t hands to the step before, real, and of sums; and dx."""
    v = v + c * dy
    return p * v, dp + v * past, db + v * x, dx + b * v


@njit(**INLINE)
def _turned_back(
    r: int, dx: Any, v: Any, vi: Any, dp: Any, dpi: Any, db: Any, dbi: Any, past: Any, pasti: Any,
    p: Any, pi: Any, b: Any, bi: Any, c: Any, ci: Any, x: Any, dy: Any,
) -> Any:  # fmt: skip
    """`_back` of complex states."""
    v, vi = v + c * dy, vi + ci * dy
    return (
        p * v + pi * vi,
        p * vi - pi * v,
        dp + v * past + vi * pasti,
        dpi + vi * past - v * pasti,
        db + v * x,
        dbi + vi * x,
        dx + b * v + bi * vi,
    )


@njit(**INLINE)
def _sum_up(r: int, nothing: Any, total: Any, h: Any, dy: Any) -> Any:
    """One row of the gradient of c."""
    return total + h * dy, nothing


@njit(**OPTIONS)
def _take(tile: Any, base: int, given: Any, at: int, part: int, pair: int, lanes: int, states: int) -> None:
    """Part 0 or 1 of given (channels, N, pair) from `at` on, to rows of states; pads keep what they are."""
    for lane in range(lanes):
        for n in range(states):
            tile[base + n * LANES + lane] = given[at + (lane * states + n) * pair + part]


@njit(**OPTIONS)
def _give(given: Any, at: int, part: int, pair: int, tile: Any, base: int, lanes: int, states: int) -> None:
    """The inverse of `_take`."""
    for lane in range(lanes):
        for n in range(states):
            given[at + (lane * states + n) * pair + part] = tile[base + n * LANES + lane]


@njit(**OPTIONS)
def _correct(h: Any, i: Any, rest: Any, rest_i: Any, steps: int, sign: Any, turning: Any) -> None:
    """h *= (p / float32(p))^steps; sign -1: its conjugate."""
    many = np.float32(steps)
    for j in range(h.size):
        if turning is None:
            h[j] += h[j] * rest[j] * many
        else:
            factor, turn = rest[j] * many, rest_i[j] * many * sign
            h[j], i[j] = h[j] + (h[j] * factor - i[j] * turn), i[j] + (i[j] * factor + h[j] * turn)


@njit(**OPTIONS)
def _load_tokens(
    into: Any, given: Any, step: Any, row: int, token: int, e: int, mask: Any, many: int
) -> None:
    """The tokens of a block, 16 channels of each."""
    for t in range(many):
        at = row * step[0] + (token + t) * step[1] + e
        prefetch(given, at + AHEAD * step[1])
        row_write(into, t * LANES, row_read(given, at, mask), None)


@njit(**OPTIONS)
def forward(
    first, last, shape, turning, sizes, segments, x, x_step, decay, rest, b, c, skip, initial, y, final, marks,
):  # fmt: skip
    """Tasks first to last - 1. Arrays are flat; x_step: (row, token).

    sizes (T, E, N, N padded to whole tiles, pair, channel blocks, parts of the sequences); segments (4, S): row,
    first token, length, number of the first saved state; decay, rest, b, c (E, N, pair): p and what float32 rounds of
    it in proportion; initial, final (S, E, N, pair); marks: h entering each block but a sequence's first, in tiles;
    empty: save nothing.
    """
    length, channels, states, deep, pair, blocks, parts = sizes
    rows, area, count_all = len(shape), deep * LANES, segments.shape[1]
    h, i = _buffer(area), _buffer(area)
    p, pi, r, ri = _buffer(area), _buffer(area), _buffer(area), _buffer(area)
    w, wi, o, oi = _buffer(area), _buffer(area), _buffer(area), _buffer(area)
    xs, ys = _buffer(BLOCK * LANES), _buffer(BLOCK * LANES)
    for task in range(first, last):
        e, part = task // parts * LANES, task % parts
        lanes = min(LANES, channels - e)
        mask = first_lanes(lanes)
        for into, given in ((p, decay), (r, rest), (w, b), (o, c)):
            _take(into, 0, given, e * states * pair, 0, pair, lanes, states)
        if turning is not None:
            for into, given in ((pi, decay), (ri, rest), (wi, b), (oi, c)):
                _take(into, 0, given, e * states * pair, 1, pair, lanes, states)
        through = row_read(skip, e, mask)
        for segment in range(part * count_all // parts, (part + 1) * count_all // parts):
            row, begin, count, number = segments[:, segment]
            h[:] = _ZERO
            i[:] = _ZERO
            of_state = (segment * channels + e) * states * pair
            if initial.size > 0:
                _take(h, 0, initial, of_state, 0, pair, lanes, states)
                if turning is not None:
                    _take(i, 0, initial, of_state, 1, pair, lanes, states)
            for t0 in range(0, count, BLOCK):
                many = min(BLOCK, count - t0)
                if marks.size > 0 and t0 > 0:
                    saved = ((number + t0 // BLOCK - 1) * blocks + e // LANES) * area * pair
                    marks[saved : saved + area] = h
                    if turning is not None:
                        marks[saved + area : saved + 2 * area] = i
                _load_tokens(xs, x, x_step, row, begin + t0, e, mask, many)
                for t in range(many):
                    row_write(ys, t * LANES, through * row_read(xs, t * LANES, None), None)
                for n in range(0, area, rows * LANES):
                    gate, key = tile_load(shape, p, n, LANES), tile_load(shape, w, n, LANES)
                    query, now = tile_load(shape, o, n, LANES), tile_load(shape, h, n, LANES)
                    if turning is None:
                        for t in range(many):
                            at = t * LANES
                            out, u = row_read(ys, at, None), row_read(xs, at, None)
                            now, out = rowwise(_decayed, out, now, gate, key, query, u)
                            row_write(ys, at, out, None)
                    else:
                        gate_i, key_i = tile_load(shape, pi, n, LANES), tile_load(shape, wi, n, LANES)
                        query_i, now_i = tile_load(shape, oi, n, LANES), tile_load(shape, i, n, LANES)
                        for t in range(many):
                            at = t * LANES
                            out, u = row_read(ys, at, None), row_read(xs, at, None)
                            now, now_i, out = rowwise(
                                _turned, out, now, now_i, gate, gate_i, key, key_i, query, query_i, u
                            )
                            row_write(ys, at, out, None)
                        tile_store(i, n, LANES, now_i)
                    tile_store(h, n, LANES, now)
                _correct(h, i, r, ri, many, _ONE, turning)
                for t in range(many):
                    target = (row * length + begin + t0 + t) * channels + e
                    row_write(y, target, row_read(ys, t * LANES, None), mask)
            _give(final, of_state, 0, pair, h, 0, lanes, states)
            if turning is not None:
                _give(final, of_state, 1, pair, i, 0, lanes, states)


@njit(**OPTIONS)
def backward(
    first, last, shape, turning, sizes, segments, x, x_step, dy, dy_step, decay, rest, b, c, skip, initial,
    dfinal, marks, dx, dinitial, dp, db, dc, dskip,
):  # fmt: skip
    """The gradient, tasks first to last - 1; see `forward`. dp, db, dc (parts, E, N, pair), dskip (parts, E)."""
    length, channels, states, deep, pair, blocks, parts = sizes
    rows, area, count_all = len(shape), deep * LANES, segments.shape[1]
    h, i, v, vi = _buffer(area), _buffer(area), _buffer(area), _buffer(area)
    p, pi, r, ri = _buffer(area), _buffer(area), _buffer(area), _buffer(area)
    w, wi, o, oi = _buffer(area), _buffer(area), _buffer(area), _buffer(area)
    gp, gpi, gw, gwi, go, goi = (
        _buffer(area), _buffer(area), _buffer(area), _buffer(area), _buffer(area), _buffer(area),
    )  # fmt: skip
    kept, kept_i = _buffer((BLOCK + 1) * rows * LANES), _buffer((BLOCK + 1) * rows * LANES)
    xs, dys, dxs = _buffer(BLOCK * LANES), _buffer(BLOCK * LANES), _buffer(BLOCK * LANES)
    nothing = tile_zero(_ROW)
    for task in range(first, last):
        e, part = task // parts * LANES, task % parts
        lanes = min(LANES, channels - e)
        mask, of = first_lanes(lanes), e * states * pair
        for into, given in ((p, decay), (r, rest), (w, b), (o, c)):
            _take(into, 0, given, of, 0, pair, lanes, states)
        if turning is not None:
            for into, given in ((pi, decay), (ri, rest), (wi, b), (oi, c)):
                _take(into, 0, given, of, 1, pair, lanes, states)
        for total in (gp, gpi, gw, gwi, go, goi):
            total[:] = _ZERO
        through, to_skip = row_read(skip, e, mask), nothing
        for segment in range(part * count_all // parts, (part + 1) * count_all // parts):
            row, begin, count, number = segments[:, segment]
            of_state = (segment * channels + e) * states * pair
            v[:] = _ZERO
            vi[:] = _ZERO
            if dfinal.size > 0:
                _take(v, 0, dfinal, of_state, 0, pair, lanes, states)
                if turning is not None:
                    _take(vi, 0, dfinal, of_state, 1, pair, lanes, states)
            for t0 in range((count - 1) // BLOCK * BLOCK, -1, -BLOCK):
                many = min(BLOCK, count - t0)
                h[:] = _ZERO
                i[:] = _ZERO
                if t0 > 0:
                    saved = ((number + t0 // BLOCK - 1) * blocks + e // LANES) * area * pair
                    h[:] = marks[saved : saved + area]
                    if turning is not None:
                        i[:] = marks[saved + area : saved + 2 * area]
                elif initial.size > 0:
                    _take(h, 0, initial, of_state, 0, pair, lanes, states)
                    if turning is not None:
                        _take(i, 0, initial, of_state, 1, pair, lanes, states)
                _load_tokens(xs, x, x_step, row, begin + t0, e, mask, many)
                _load_tokens(dys, dy, dy_step, row, begin + t0, e, mask, many)
                for t in range(many):
                    grad = row_read(dys, t * LANES, None)
                    to_skip = to_skip + grad * row_read(xs, t * LANES, None)
                    row_write(dxs, t * LANES, through * grad, None)
                _correct(v, vi, r, ri, many, -_ONE, turning)
                for n in range(0, area, rows * LANES):
                    gate, key = tile_load(shape, p, n, LANES), tile_load(shape, w, n, LANES)
                    query, now = tile_load(shape, o, n, LANES), tile_load(shape, h, n, LANES)
                    to_p, to_w = tile_load(shape, gp, n, LANES), tile_load(shape, gw, n, LANES)
                    to_o, grad_h = tile_load(shape, go, n, LANES), tile_load(shape, v, n, LANES)
                    if turning is None:
                        for t in range(many):
                            tile_store(kept, t * rows * LANES, LANES, now)
                            at = t * LANES
                            now, _ = rowwise(_decayed, nothing, now, gate, key, query, row_read(xs, at, None))
                            to_o, _ = rowwise(_sum_up, nothing, to_o, now, row_read(dys, at, None))
                        for t in range(many - 1, -1, -1):
                            past, at = tile_load(shape, kept, t * rows * LANES, LANES), t * LANES
                            u, grad, to_x = (
                                row_read(xs, at, None),
                                row_read(dys, at, None),
                                row_read(dxs, at, None),
                            )
                            grad_h, to_p, to_w, to_x = rowwise(
                                _back, to_x, grad_h, to_p, to_w, past, gate, key, query, u, grad
                            )
                            row_write(dxs, at, to_x, None)
                    else:
                        gate_i, key_i = tile_load(shape, pi, n, LANES), tile_load(shape, wi, n, LANES)
                        query_i, now_i = tile_load(shape, oi, n, LANES), tile_load(shape, i, n, LANES)
                        to_oi = tile_load(shape, goi, n, LANES)
                        for t in range(many):
                            tile_store(kept, t * rows * LANES, LANES, now)
                            tile_store(kept_i, t * rows * LANES, LANES, now_i)
                            u, grad = row_read(xs, t * LANES, None), row_read(dys, t * LANES, None)
                            now, now_i, _ = rowwise(
                                _turned, nothing, now, now_i, gate, gate_i, key, key_i, query, query_i, u
                            )
                            to_o, _ = rowwise(_sum_up, nothing, to_o, now, grad)
                            to_oi, _ = rowwise(_sum_up, nothing, to_oi, now_i, grad)
                        tile_store(goi, n, LANES, to_oi)
                        to_pi, to_wi = tile_load(shape, gpi, n, LANES), tile_load(shape, gwi, n, LANES)
                        grad_i = tile_load(shape, vi, n, LANES)
                        for t in range(many - 1, -1, -1):
                            past = tile_load(shape, kept, t * rows * LANES, LANES)
                            past_i, at = tile_load(shape, kept_i, t * rows * LANES, LANES), t * LANES
                            u, grad, to_x = (
                                row_read(xs, at, None),
                                row_read(dys, at, None),
                                row_read(dxs, at, None),
                            )
                            grad_h, grad_i, to_p, to_pi, to_w, to_wi, to_x = rowwise(
                                _turned_back, to_x, grad_h, grad_i, to_p, to_pi, to_w, to_wi, past, past_i,
                                gate, gate_i, key, key_i, query, query_i, u, grad,
                            )  # fmt: skip
                            row_write(dxs, at, to_x, None)
                        tile_store(gpi, n, LANES, to_pi)
                        tile_store(gwi, n, LANES, to_wi)
                        tile_store(vi, n, LANES, grad_i)
                    tile_store(gp, n, LANES, to_p)
                    tile_store(gw, n, LANES, to_w)
                    tile_store(go, n, LANES, to_o)
                    tile_store(v, n, LANES, grad_h)
                for t in range(many):
                    target = (row * length + begin + t0 + t) * channels + e
                    row_write(dx, target, row_read(dxs, t * LANES, None), mask)
            _give(dinitial, of_state, 0, pair, v, 0, lanes, states)
            if turning is not None:
                _give(dinitial, of_state, 1, pair, vi, 0, lanes, states)
        row_write(dskip, part * channels + e, to_skip, mask)
        for into, total, total_i in ((dp, gp, gpi), (db, gw, gwi), (dc, go, goi)):
            at = (part * channels + e) * states * pair
            _give(into, at, 0, pair, total, 0, lanes, states)
            if turning is not None:
                _give(into, at, 1, pair, total_i, 0, lanes, states)
