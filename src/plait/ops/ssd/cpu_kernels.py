"""Numba kernels of the gated outer-product recurrence under Mamba-2 and Mamba-3: forward, and what backward shares.

    S_t = g_t S_{t-1} + w_t sum_r u_{t,r} k_{t,r}^T,   u_{t,r} = v_t m_r
    y_{t,r} = (g_t S_{t-1} + d_t sum_s u_{t,s} k_{t,s}^T) q_{t,r} + D u_{t,r}
    g = exp(a) the decay; Mamba-2: rank 1, no m, d = w                        (arXiv 2405.21060, arXiv 2603.15569)

Everything is a product of small matrices. A slab is at most 16 rows, the ranks of one or more tokens, and its pads.
With c the decay from before the slab to a row, e that from a row to the slab's end, L_ij that from row j to row i,
and W_ij = L_ij w_j for an earlier token j, d for the same, 0 for a later:

    y_i = c_i S q_i + sum_j W_ij (q_i k_j) u_j         S <- c_end S + sum_j e_j w_j u_j k_j^T
    dq_i = c_i S^T dy_i + sum_j W_ij (dy_i u_j) k_j    dk_j = e_j w_j dS^T u_j + sum_i W_ij (dy_i u_j) q_i
    du_j = e_j w_j dS k_j + sum_i W_ij (q_i k_j) dy_i  dS <- c_end dS + sum_i c_i dy_i q_i^T

dS is the gradient of the state after the slab. Decays are products of g, never exp of a difference. The gradient of
a_t is the sum over all paths that cross t, from inputs of the slab or before it to outputs of the slab or after it:
no path is taken off again, so nothing cancels, however strong the decay.

A task is one sequence and some heads of a group, which share q k. Forward saves the states that enter blocks of
SLABS slabs; backward takes the blocks last to first and repeats one forward. Tasks write to places of their own and
add in a fixed order, so results do not depend on how many threads share the tasks.

`big` and `tall`, nested tuples of zeros, are for their types: the rows and vectors of the tiles that the products
are made of. Buffers and states are padded to whole tiles with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import first as first_lanes
from plait.ops.tile_math import row_read, row_write, tile_flush, tile_zero
from plait.ops.tiles import (
    LANES,
    copy,
    prefetch,
    row_load,
    tile_load,
    tile_outer,
    tile_scale,
    tile_store,
    tile_turn,
)

TILES = "e87e7652"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
INLINE: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": True}
ROWS = 16
"""of a slab, padded"""
SLABS = 4
"""of a block: one state a block is kept for backward"""
TINY = np.float32(1e-37)
"""Products of several decays below it are 0: denormal numbers cost a processor a hundred times the normal ones."""
AREA = ROWS * LANES
ROW, _SQUARE = ((0,),), ((0,),) * ROWS
ONE, ZERO = np.float32(1), np.float32(0)


@njit(**OPTIONS)
def buffer(count: int) -> Any:
    """Zeros that begin on a cache line: a vector across two costs twice."""
    room = np.zeros(count + LANES, np.float32)
    skip = -(room.ctypes.data // 4) % LANES
    return room[skip : skip + count]


@njit(**OPTIONS)
def up(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return (count + step - 1) // step * step


@njit(**OPTIONS)
def begin_state(
    state: Any, base: int, area: int, given: Any, at: int, width: int, size: int, long: int
) -> None:
    """Fill a padded state with `given` (P, N) from `at` on, or with zeros if `given` is empty."""
    state[base : base + area] = ZERO
    if given.size > 0:
        for p in range(width):
            copy(state, base + p * long, given, at + p * size, size, ONE)


@njit(**OPTIONS)
def task_heads(part: int, heads: int, groups: int, share: int) -> tuple[int, int, int]:
    """The group of a task, its first head and the one after its last."""
    per_group = heads // groups
    parts = (per_group + share - 1) // share
    group = part // parts
    head = group * per_group + part % parts * share
    return group, head, min(head + share, (group + 1) * per_group)


@njit(**OPTIONS)
def product(
    shape, out, at, out_step, a, a_at, a_row, a_step, b, b_at, b_step, height, width, count
):  # fmt: skip
    """out (height, width) = the sum over k < count of column k of a and row k of b; b's rows lie side by side."""
    rows, lanes = len(shape), LANES * len(shape[0])
    for c in range(0, width, lanes):
        for r in range(0, height, rows):
            tile = tile_zero(shape)
            for k in range(count):
                row = row_load(shape, b, b_at + k * b_step + c)
                tile = tile_outer(tile, a, a_at + r * a_row + k * a_step, a_row, row)
            tile_store(out, at + r * out_step + c, out_step, tile)


@njit(**OPTIONS)
def product_added(
    shape, out, at, given, given_at, step, factor, a, a_at, a_row, a_step, b, b_at, b_step, height, width, count
):  # fmt: skip
    """out = factor * given + the product of `product`; out and given have the same steps."""
    rows, lanes = len(shape), LANES * len(shape[0])
    for c in range(0, width, lanes):
        for r in range(0, height, rows):
            tile = tile_scale(factor, tile_load(shape, given, given_at + r * step + c, step))
            for k in range(count):
                row = row_load(shape, b, b_at + k * b_step + c)
                tile = tile_outer(tile, a, a_at + r * a_row + k * a_step, a_row, row)
            tile_store(out, at + r * step + c, step, tile)


@njit(**OPTIONS)
def through_state(
    shape, out, at, state, base, long, columns, columns_at, weights, x, x_at, wide, inner, inner_at, height, size, count
):  # fmt: skip
    """out (P, 16) = (state columns) * weights + x^T inner: what the state and the slab itself give to each row."""
    for p in range(0, height, len(shape)):
        tile = tile_zero(shape)
        for n in range(size):
            tile = tile_outer(
                tile, state, base + p * long + n, long, row_load(shape, columns, columns_at + n * LANES)
            )
        tile = tile * row_read(weights, 0, None)
        for j in range(count):
            tile = tile_outer(tile, x, x_at + j * wide + p, 1, row_load(shape, inner, inner_at + j * LANES))
        tile_store(out, at + p * LANES, LANES, tile)


@njit(**OPTIONS)
def turn(
    out: Any, at: int, out_step: int, given: Any, given_at: int, step: int, height: int, width: int
) -> None:
    """out (width, height) = given (height, width) transposed; both are multiples of 16."""
    for r in range(0, height, ROWS):
        for c in range(0, width, LANES):
            tile = tile_turn(tile_load(_SQUARE, given, given_at + r * step + c, step))
            tile_store(out, at + c * out_step + r, out_step, tile)


@njit(**INLINE)
def write(out: Any, at: int, row: Any, count: int) -> None:
    """The first `count` lanes of a row, or all of them."""
    if count >= LANES:
        row_write(out, at, row, None)
    else:
        row_write(out, at, row, first_lanes(count))


@njit(**INLINE)
def times(decay: float, gate: float) -> float:
    """A decay over one step more, in float64: what float32 rounds would count at each of a long memory's steps."""
    product = decay * gate
    return 0.0 if product < TINY and decay < 1 else product


@njit(**OPTIONS)
def masks(rank: int, many: int) -> tuple[Any, Any]:
    """own, earlier (tokens, 16): which rows are of the token, and of a token before it; ones and zeros."""
    own, earlier = buffer(many * LANES), buffer(many * LANES)
    for t in range(many):
        earlier[t * LANES : t * LANES + t * rank] = ONE
        own[t * LANES + t * rank : t * LANES + (t + 1) * rank] = ONE
    return own, earlier


@njit(**OPTIONS)
def load_rows(
    out, at, out_step, given, step, token, head, many, rank, width
):  # fmt: skip
    """The rows (many * rank) of a slab's q or k, and zeros after them."""
    for t in range(many):
        for r in range(rank):
            source = (token + t) * step[0] + r * step[1] + head * step[2]
            copy(out, at + (t * rank + r) * out_step, given, source, width, ONE)
    out[at + many * rank * out_step : at + ROWS * out_step] = ZERO


@njit(**OPTIONS)
def load_values(
    us, at, wide, x, x_step, token, head, ranks, many, rank, width
):  # fmt: skip
    """The rows u = v m of a slab, and zeros after them."""
    for t in range(many):
        source = (token + t) * x_step[0] + head * x_step[1]
        prefetch(x, source + many * x_step[0], width)
        first_row = at + t * rank * wide
        if ranks.size == 0:
            copy(us, first_row, x, source, width, ONE)
            continue
        for r in range(rank - 1, -1, -1):
            copy(us, first_row + r * wide, x, source, width, ONE)
            of = (head * rank + r) * width
            for p in range(width):
                us[first_row + r * wide + p] *= ranks[of + p]
    us[at + many * rank * wide : at + ROWS * wide] = ZERO


@njit(**OPTIONS)
def forward_decays(
    gates, weights, diagonal, at, heads, many, rank, own, inner, enter, leave
):  # fmt: skip
    """inner (16, 16): row j has W_ij over all i; enter (16): c; leave (16): e w of every row. Returns c_end."""
    inner[many * rank * LANES :] = ZERO
    enter[:] = ZERO
    leave[:] = ZERO
    later, c, e = tile_zero(ROW), 1.0, 1.0
    for t in range(many):
        c = times(c, gates[at + t * heads])
        enter[t * rank : (t + 1) * rank] = c
    for t in range(many - 1, -1, -1):
        mine, w = row_read(own, t * LANES, None), weights[at + t * heads]
        gate = np.float32(gates[at + t * heads])
        line = later * w + mine * diagonal[at + t * heads]
        leave[t * rank : (t + 1) * rank] = e * w
        for r in range(t * rank, (t + 1) * rank):
            row_write(inner, r * LANES, line, None)
        e = times(e, gates[at + t * heads])
        later = tile_flush(later * gate, TINY) + mine * gate
    return np.float32(c)


@njit(**OPTIONS)
def forward(
    first, last, big, tall, sizes, segments, x, x_step, k, k_step, q, q_step, gates, weights, diagonal,
    skip, ranks, initial, y, final, marks,
):  # fmt: skip
    """Tasks first to last - 1. Arrays are flat; steps: (token, head) of x, (token, rank, group) of k and q.

    sizes (T, H, P, G, N, R, heads a task, tasks a sequence); segments (4, S): row, first token, length, number of the
    first saved state; gates (float64), weights, diagonal (tokens, H): g, w, d; skip (H, P); ranks (H, R, P): m, or
    empty; y (tokens, R, H, P); marks: S entering each block but a sequence's first, padded; empty: save nothing.
    """
    length, heads, width, groups, size, rank, share, parts = sizes
    wide, long = up(width, ROWS), up(size, LANES * len(big[0]))
    area, slab = wide * long, ROWS // rank
    own, _ = masks(rank, slab)
    states = buffer(share * area)
    ks, qs, turned = buffer(ROWS * long), buffer(ROWS * long), buffer(ROWS * long)
    us, scaled, columns = buffer(ROWS * wide), buffer(ROWS * wide), buffer(ROWS * wide)
    dots, inner = buffer(AREA), buffer(AREA)
    enter, leave, through = buffer(LANES), buffer(LANES), buffer(wide)
    for task in range(first, last):
        segment = task // parts
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = task_heads(task % parts, heads, groups, share)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            begin_state(states, base, area, initial, outer, width, size, long)
        for t0 in range(0, count, slab):
            many, token = min(slab, count - t0), row * length + begin + t0
            rows = many * rank
            load_rows(ks, 0, long, k, k_step, token, group, many, rank, size)
            load_rows(qs, 0, long, q, q_step, token, group, many, rank, size)
            turn(turned, 0, LANES, qs, 0, long, ROWS, long)
            product(tall, dots, 0, LANES, ks, 0, long, 1, turned, 0, LANES, ROWS, LANES, size)
            for head in range(head_begin, head_end):
                base = (head - head_begin) * area
                if marks.size > 0 and t0 > 0 and t0 % (SLABS * slab) == 0:
                    saved = ((number + t0 // (SLABS * slab) - 1) * heads + head) * area
                    copy(marks, saved, states, base, area, ONE)
                load_values(us, 0, wide, x, x_step, token, head, ranks, many, rank, width)
                end = forward_decays(
                    gates, weights, diagonal, token * heads + head, heads, many, rank, own, inner, enter, leave
                )  # fmt: skip
                for i in range(0, AREA, LANES):
                    row_write(inner, i, row_read(inner, i, None) * row_read(dots, i, None), None)
                for i in range(rows):
                    copy(scaled, i * wide, us, i * wide, wide, leave[i])
                    prefetch(y, ((token * rank + i) * heads + head) * width, width)
                for p in range(
                    0, wide, ROWS
                ):  # what is read of the state is still in the first cache when written
                    at = base + p * long
                    through_state(
                        tall, columns, p * LANES, states, at, long, turned, 0, enter, us, p, wide, inner, 0,
                        ROWS, size, rows,
                    )  # fmt: skip
                    product_added(
                        big, states, at, states, at, long, end, scaled, p, 1, wide, ks, 0, long, ROWS, long, rows
                    )  # fmt: skip
                turn(scaled, 0, wide, columns, 0, LANES, wide, LANES)
                copy(through, 0, skip, head * width, width, ONE)
                for i in range(rows):
                    target = ((token * rank + i) * heads + head) * width
                    for p in range(0, wide, LANES):
                        out = row_read(scaled, i * wide + p, None)
                        out = out + row_read(through, p, None) * row_read(us, i * wide + p, None)
                        write(y, target + p, out, width - p)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            for p in range(width):
                copy(final, outer + p * size, states, base + p * long, size, ONE)
