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
are made of. Buffers and states are padded to whole tiles with zeros. States, k and q lie in panels: as many columns
as a tile has, of all rows, and then the next columns. So the rows of a tile are a constant apart, and a panel of S
and one of dS stay in the first cache together. What each tile prefetches is spread over the products (`fetch`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import first as first_lanes
from plait.ops.tile_math import row_read, row_write, tile_flush, tile_zero
from plait.ops.tiles import (
    LANES,
    borrow,
    copy,
    parts,
    prefetch,
    row_load,
    tile_load,
    tile_outer,
    tile_scale,
    tile_store,
    tile_turn,
)

TILES = "e7660550"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
INLINE: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": True}
ROWS = 16
"""of a slab, padded"""
SLABS = 8
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


@njit(**INLINE)
def clear(out: Any, at: int, count: int) -> None:
    """Zeros, a multiple of 16 of them."""
    for i in range(at, at + count, LANES):
        row_write(out, i, tile_zero(ROW), None)


@njit(**OPTIONS)
def up(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return (count + step - 1) // step * step


@njit(**OPTIONS)
def begin_state(
    big: Any, state: Any, base: int, area: int, given: Any, at: int, width: int, size: int
) -> None:
    """Fill a state in panels with `given` (P, N) from `at` on, or with zeros if `given` is empty."""
    lanes, wide = LANES * len(big[0]), up(width, ROWS)
    clear(state, base, area)
    if given.size > 0:
        for c in range(0, size, lanes):
            for p in range(width):
                count = min(lanes, size - c)
                copy(state, base + c * wide + p * lanes, given, at + p * size + c, count, ONE)


@njit(**OPTIONS)
def end_state(big: Any, out: Any, at: int, state: Any, base: int, width: int, size: int) -> None:
    """Write a state in panels to `out` (P, N) from `at` on."""
    lanes, wide = LANES * len(big[0]), up(width, ROWS)
    for c in range(0, size, lanes):
        for p in range(width):
            copy(out, at + p * size + c, state, base + c * wide + p * lanes, min(lanes, size - c), ONE)


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
    shape, out, at, a, a_at, a_row, b, b_at, count
):  # fmt: skip
    """out (16, 16) = the sum over k < count of column k of a and row k of b, 16 wide."""
    for r in range(0, ROWS, len(shape)):
        tile = tile_zero(shape)
        for k in range(count):
            tile = tile_outer(tile, a, a_at + r * a_row + k, a_row, row_load(shape, b, b_at + k * LANES))
        tile_store(out, at + r * LANES, LANES, tile)


@njit(**INLINE)
def fetch(soon: Any, r: int, rows: int, height: int) -> None:
    """Ask for what is needed soon, (array, at, step, count) of 16 rows: as many as r to r + rows are of `height`.

    A few lines with each tile come while it is computed; many at once would have to wait for each other.
    """
    array, at, step, count = soon
    for i in range(r * ROWS // height, (r + rows) * ROWS // height):
        prefetch(array, at + i * step, count)


@njit(**OPTIONS)
def product_added(
    shape, out, at, given, given_at, factor, a, a_at, a_row, a_step, b, b_at, height, count, soon
):  # fmt: skip
    """One panel: out = factor * given + the sum over k < count of column k of a and row k of b."""
    lanes = LANES * len(shape[0])
    for r in range(0, height, len(shape)):
        fetch(soon, r, len(shape), height)
        tile = tile_scale(factor, tile_load(shape, given, given_at + r * lanes, lanes))
        for k in range(count):
            row = row_load(shape, b, b_at + k * lanes)
            tile = tile_outer(tile, a, a_at + r * a_row + k * a_step, a_row, row)
        tile_store(out, at + r * lanes, lanes, tile)


@njit(**INLINE)
def across(
    big, shape, given, at, high, columns, columns_at, size
):  # fmt: skip
    """The tile of rows of `given`, in panels of `high` rows, times columns (N, 16)."""
    lanes, tile = LANES * len(big[0]), tile_zero(shape)
    for c in range(0, size, lanes):
        for n in range(min(lanes, size - c)):
            row = row_load(shape, columns, columns_at + (c + n) * LANES)
            tile = tile_outer(tile, given, at + c * high + n, lanes, row)
    return tile


@njit(**OPTIONS)
def scores(
    big, tall, out, at, given, given_at, columns, columns_at, size
):  # fmt: skip
    """out (16, 16) = given (16, N), in panels, times columns (N, 16)."""
    for r in range(0, ROWS, len(tall)):
        place = given_at + r * LANES * len(big[0])
        tile_store(
            out, at + r * LANES, LANES, across(big, tall, given, place, ROWS, columns, columns_at, size)
        )


@njit(**OPTIONS)
def through_state(
    big, tall, out, at, state, base, columns, columns_at, weights, x, x_at, wide, inner, size, count, soon, next_values
):  # fmt: skip
    """out (P, 16) = (state columns) * weights + x^T inner: what the state and the slab itself give to each row."""
    for p in range(0, wide, len(tall)):
        fetch(soon, p, len(tall), wide)
        fetch(next_values, p, len(tall), wide)
        place = base + p * LANES * len(big[0])
        tile = across(big, tall, state, place, wide, columns, columns_at, size) * row_read(weights, 0, None)
        for j in range(count):
            tile = tile_outer(tile, x, x_at + j * wide + p, 1, row_load(tall, inner, j * LANES))
        tile_store(out, at + p * LANES, LANES, tile)


@njit(**OPTIONS)
def turn_panels(
    big, out, at, given, given_at, size
):  # fmt: skip
    """out (N, 16) = given (16, N), in panels, transposed."""
    lanes = LANES * len(big[0])
    for c in range(0, size, LANES):
        tile = tile_load(_SQUARE, given, given_at + c // lanes * lanes * ROWS + c % lanes, lanes)
        tile_store(out, at + c * LANES, LANES, tile_turn(tile))


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
def masks(rank: int, many: int, own: Any, earlier: Any) -> None:
    """own, earlier (tokens, 16): which rows are of the token, and of a token before it; ones and zeros."""
    for t in range(many):
        for i in range(LANES):
            own[t * LANES + i] = ONE if i // rank == t else ZERO
            earlier[t * LANES + i] = ONE if i < t * rank else ZERO


@njit(**OPTIONS)
def load_rows(
    out, at, lanes, given, step, token, head, many, rank, width
):  # fmt: skip
    """The rows (many * rank) of a slab's q, k or dy in panels of `lanes` columns, and zeros after them."""
    for c in range(0, width, lanes):
        panel = at + c * ROWS
        for t in range(many):
            for r in range(rank):
                source = (token + t) * step[0] + r * step[1] + head * step[2] + c
                copy(out, panel + (t * rank + r) * lanes, given, source, min(lanes, width - c), ONE)
        clear(out, panel + many * rank * lanes, (ROWS - many * rank) * lanes)


@njit(**OPTIONS)
def load_values(
    us, at, wide, x, x_step, token, head, ranks, many, rank, width
):  # fmt: skip
    """The rows u = v m of a slab, and zeros after them."""
    for t in range(many):
        source = (token + t) * x_step[0] + head * x_step[1]
        first_row = at + t * rank * wide
        if ranks.size == 0:
            copy(us, first_row, x, source, width, ONE)
            continue
        for r in range(rank - 1, -1, -1):
            copy(us, first_row + r * wide, x, source, width, ONE)
            of = (head * rank + r) * width
            for p in range(width):
                us[first_row + r * wide + p] *= ranks[of + p]
    clear(us, at + many * rank * wide, (ROWS - many * rank) * wide)


@njit(**OPTIONS)
def forward_decays(
    gates, weights, diagonal, at, heads, many, rank, own, inner, enter, leave
):  # fmt: skip
    """inner (16, 16): row j has W_ij over all i; enter (16): c; leave (16): e w of every row. Returns c_end."""
    clear(inner, many * rank * LANES, AREA - many * rank * LANES)
    clear(enter, 0, LANES)
    clear(leave, 0, LANES)
    later, c, e = tile_zero(ROW), 1.0, 1.0
    for t in range(many):
        c = times(c, gates[at + t * heads])
        for r in range(t * rank, (t + 1) * rank):
            enter[r] = c
    for t in range(many - 1, -1, -1):
        mine, w = row_read(own, t * LANES, None), weights[at + t * heads]
        gate = np.float32(gates[at + t * heads])
        line = later * w + mine * diagonal[at + t * heads]
        for r in range(t * rank, (t + 1) * rank):
            leave[r] = e * w
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
    length, heads, width, groups, size, rank, share, pieces = sizes
    lanes = LANES * len(big[0])
    wide, long, slab = up(width, ROWS), up(size, lanes), ROWS // rank
    area = wide * long
    deep, narrow = ROWS * long, ROWS * wide
    counts = (
        slab * LANES, slab * LANES, share * area, deep, deep, deep, narrow, narrow, narrow,
        AREA, AREA, LANES, LANES, wide,
    )  # fmt: skip
    room = buffer(sum(counts))
    own, earlier, states, ks, qs, turned, us, scaled, columns, dots, inner, enter, leave, through = parts(
        room, counts
    )
    x, k, q, gates, weights, diagonal, skip, ranks, initial, y, final, marks = borrow(
        x, k, q, gates, weights, diagonal, skip, ranks, initial, y, final, marks
    )
    masks(rank, slab, own, earlier)
    for task in range(first, last):
        segment = task // pieces
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = task_heads(task % pieces, heads, groups, share)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            begin_state(big, states, base, area, initial, outer, width, size)
        for t0 in range(0, count, slab):
            many, token = min(slab, count - t0), row * length + begin + t0
            rows = many * rank
            load_rows(ks, 0, lanes, k, k_step, token, group, many, rank, size)
            load_rows(qs, 0, lanes, q, q_step, token, group, many, rank, size)
            turn_panels(big, turned, 0, qs, 0, size)
            scores(big, tall, dots, 0, ks, 0, turned, 0, size)
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
                place = (token * rank * heads + head) * width
                through_state(
                    big, tall, columns, 0, states, base, turned, 0, enter, us, 0, wide, inner, size, rows,
                    (y, place, heads * width, width),
                    (x, (token + many) * x_step[0] + head * x_step[1], x_step[0], width),
                )  # fmt: skip
                saved = ((number + t0 // (SLABS * slab)) * heads + head) * area + t0 // slab % SLABS * (
                    area // SLABS
                )
                for c in range(0, long, lanes):
                    at = base + c * wide
                    ask = lanes * wide // (SLABS * ROWS) if marks.size > 0 else 0
                    product_added(
                        big, states, at, states, at, end, scaled, 0, 1, wide, ks, c * ROWS, wide, rows,
                        (marks, saved + c * wide // SLABS, ask, ask),
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
            end_state(big, final, outer, states, base, width, size)
    room[0] = ZERO  # it is needed until here
