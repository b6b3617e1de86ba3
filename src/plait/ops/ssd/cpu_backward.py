"""Numba kernels of the gated outer-product recurrence under Mamba-2 and Mamba-3: the gradient, written by hand.

Formulas, words and conventions are those of `cpu_kernels.py`. For each block of slabs, last to first, one forward
repeats the states from the one that was saved; then each slab takes dS over itself.

The gradient of a_t is a sum over paths: across the slab (c_end S dS), from before it into row i (c_i dy_i S q_i), from
row j beyond its end (e_j w_j u_j dS k_j), and from row j to row i (W_ij (dy_i u_j) (q_i k_j)), each counted for the
tokens t that it passes.
"""

# Numba types these itself: jitted functions mean nothing to mypy
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.ssd.cpu_kernels import (
    AREA,
    ONE,
    OPTIONS,
    ROW,
    ROWS,
    SLABS,
    TINY,
    ZERO,
    begin_state,
    buffer,
    clear,
    end_state,
    fetch,
    forward_decays,
    load_rows,
    load_values,
    masks,
    product,
    product_added,
    scores,
    task_heads,
    through_state,
    times,
    turn,
    turn_panels,
    up,
    write,
)
from plait.ops.tile_math import row_read, row_write, tile_column, tile_flush, tile_zero
from plait.ops.tiles import (
    LANES,
    borrow,
    copy,
    lane_sum,
    parts,
    row_load,
    tile_inner,
    tile_load,
    tile_outer,
    tile_store,
)

TILES = "3bee4144"
"""Of the files the kernels are made of: a change there must change this one too, or Numba takes old kernels."""


@njit(**OPTIONS)
def _inner(big: Any, a: Any, a_at: int, b: Any, b_at: int, count: int, room: Any) -> Any:
    """The inner product of `count` numbers, a multiple of a tile's; room: for a tile."""
    lanes, tile = LANES * len(big[0]), tile_zero(big)
    for i in range(0, count, len(big) * lanes):
        tile = tile + tile_load(big, a, a_at + i, lanes) * tile_load(big, b, b_at + i, lanes)
    tile_store(room, 0, lanes, tile)
    total = tile_zero(ROW)
    for i in range(0, len(big) * lanes, LANES):
        total = total + row_read(room, i, None)
    row_write(room, 0, total, None)
    return lane_sum(room, 0)


@njit(**OPTIONS)
def _product_weighed(
    shape, out, at, factors, dots, partner, a, a_at, a_row, b, b_at, count, soon
):  # fmt: skip
    """One panel: out += factors * m, and dots += the inner products of the rows of m and partner; m (16, .) = a b."""
    lanes = LANES * len(shape[0])
    for r in range(0, ROWS, len(shape)):
        tile, place = tile_zero(shape), at + r * lanes
        fetch(soon, r, len(shape), ROWS)
        for k in range(count):
            row = row_load(shape, b, b_at + k * lanes)
            tile = tile_outer(tile, a, a_at + r * a_row + k, a_row, row)
        tile_inner(dots, r, tile, tile_load(shape, partner, place, lanes))
        tile = tile_load(shape, out, place, lanes) + tile * tile_column(shape, factors, r)
        tile_store(out, place, lanes, tile)


@njit(**OPTIONS)
def _backward_decays(
    gates, weights, diagonal, at, heads, many, rank, own, inner, strict, enter, leave, leave_w
):  # fmt: skip
    """inner, strict (16, 16): row i has W_ij, and L_ij of earlier tokens, over all j; enter c; leave e; leave_w e w."""
    clear(inner, many * rank * LANES, AREA - many * rank * LANES)
    clear(strict, many * rank * LANES, AREA - many * rank * LANES)
    clear(enter, 0, LANES)
    clear(leave, 0, LANES)
    across, c, e = tile_zero(ROW), 1.0, 1.0
    for t in range(many - 1, -1, -1):
        across = across + row_read(own, t * LANES, None) * weights[at + t * heads]
        for r in range(t * rank, (t + 1) * rank):
            leave[r] = e
        e = times(e, gates[at + t * heads])
    older = just = tile_zero(ROW)
    for t in range(many):
        mine, gate = row_read(own, t * LANES, None), np.float32(gates[at + t * heads])
        older = tile_flush(older * gate, TINY) + just * gate
        c = times(c, gates[at + t * heads])
        for r in range(t * rank, (t + 1) * rank):
            enter[r] = c
        line = older * across + mine * diagonal[at + t * heads]
        for r in range(t * rank, (t + 1) * rank):
            row_write(strict, r * LANES, older, None)
            row_write(inner, r * LANES, line, None)
        just = mine
    row_write(leave_w, 0, row_read(leave, 0, None) * across, None)
    return np.float32(c)


@njit(**OPTIONS)
def _paths_within(
    inner, strict, dots, ddots, scores_sum, scores_at, sums, weights, at, heads, many, rank, own, earlier, da, dw, dd
):  # fmt: skip
    """Turn `inner` into W q k (for du), add W dy u (for dq, dk); what a, w and d get within the slab."""
    cross, to_w, to_d, across = tile_zero(ROW), tile_zero(ROW), tile_zero(ROW), tile_zero(ROW)
    for t in range(many):
        across = across + row_read(own, t * LANES, None) * weights[at + t * heads]
    for t in range(many - 1, -1, -1):
        mine = row_read(own, t * LANES, None)
        for i in range(t * rank * LANES, (t + 1) * rank * LANES, LANES):
            dot, ddot, weight = (
                row_read(dots, scores_at + i, None),
                row_read(ddots, i, None),
                row_read(inner, i, None),
            )
            both = dot * ddot
            path = both * row_read(strict, i, None)
            to_w, to_d, cross = to_w + path, to_d + both * mine, cross + path * across
            row_write(inner, i, weight * dot, None)
            row_write(
                scores_sum, scores_at + i, row_read(scores_sum, scores_at + i, None) + weight * ddot, None
            )
        row_write(sums, 0, cross * row_read(earlier, t * LANES, None), None)
        da[at + t * heads] = lane_sum(sums, 0)
    row_write(sums, 0, to_w, None)
    row_write(sums, LANES, to_d, None)
    for t in range(many):
        grad_w = grad_d = ZERO
        for r in range(t * rank, (t + 1) * rank):
            grad_w += sums[r]
            grad_d += sums[LANES + r]
        dw[at + t * heads], dd[at + t * heads] = grad_w, grad_d


@njit(**OPTIONS)
def _paths_beyond(through, r_in, r_out, weights, at, heads, many, rank, da, dw):  # fmt: skip
    """Add the paths across the slab, into its rows (r_in), and out of them (r_out: e u dS k, the gradient of w)."""
    for t in range(many - 1, -1, -1):
        for r in range(t * rank, (t + 1) * rank):
            through += r_in[r]
            dw[at + t * heads] += r_out[r]
        da[at + t * heads] += through
    leaving = ZERO
    for t in range(many):
        da[at + t * heads] += leaving
        for r in range(t * rank, (t + 1) * rank):
            leaving += r_out[r] * weights[at + t * heads]


@njit(**OPTIONS)
def _value_gradients(
    dus, dys, us, on, x, x_step, token, head, heads, many, rank, ranks, width, wide, skip, raw, dx, sums, base
):  # fmt: skip
    """dx of a slab from the rows du, less what the skip gives; adds to the gradients of D and m at sums[base]."""
    for p in range(0, wide, LANES):
        through, dskip, count = row_read(skip, p, None), tile_zero(ROW), min(width - p, LANES)
        for i in range(many * rank):
            grad, at = row_read(dys, on + i * wide + p, None), i * wide + p
            dskip = dskip + grad * row_read(us, on + at, None)
            du = row_read(dus, at, None) + through * grad
            row_write(dus, at, du, None)
            if ranks.size == 0:
                write(dx, ((token + i) * heads + head) * width + p, du, count)
        row_write(raw, 0, dskip, None)
        for i in range(count):
            sums[base + p + i] += raw[i]
    if ranks.size == 0:
        return
    for t in range(many):
        copy(raw, t * wide, x, (token + t) * x_step[0] + head * x_step[1], width, ONE)
        dus_at = t * rank * wide
        for r in range(rank):
            of, at, to = (head * rank + r) * width, dus_at + r * wide, base + (r + 1) * width
            for p in range(width):
                grad = dus[at + p]
                sums[to + p] += grad * raw[t * wide + p]
                dus[dus_at + p] = grad * ranks[of + p] + (dus[dus_at + p] if r > 0 else ZERO)
        copy(dx, ((token + t) * heads + head) * width, dus, dus_at, width, ONE)


@njit(**OPTIONS)
def backward(
    first, last, big, tall, sizes, segments, x, x_step, dy, dy_step, k, k_step, q, q_step, gates, weights,
    diagonal, skip, ranks, initial, dfinal, marks,
    dx, dk, dq, da, dw, dd, dinitial, sums,
):  # fmt: skip
    """The gradient, tasks first to last - 1; see `forward`. dy_step: (token, rank, head).

    dk, dq (tasks a group, tokens, R, G, N): one summand for each task of the same group; da, dw, dd (tokens, H);
    sums (S, H, P + R P): of each sequence the gradients of D and, if there are ranks, of m.
    """
    length, heads, width, groups, size, rank, share, pieces = sizes
    lanes = LANES * len(big[0])
    wide, long, slab = up(width, ROWS), up(size, lanes), ROWS // rank
    area, block, narrow, deep = wide * long, SLABS * slab, ROWS * wide, ROWS * long
    tokens = da.size // max(heads, 1)
    counts = (
        slab * LANES, slab * LANES, share * area, SLABS * area,
        SLABS * deep, SLABS * deep, SLABS * deep, SLABS * deep, SLABS * deep,
        SLABS * narrow, SLABS * narrow, narrow, narrow, narrow,
        SLABS * AREA, AREA, SLABS * AREA, AREA, AREA,
        LANES, LANES, LANES, LANES, LANES, max(2 * LANES, len(big) * lanes), wide,
    )  # fmt: skip
    memory = buffer(sum(counts))
    (
        own, earlier, dstates, states, ks, qs, turned, dk_sum, dq_sum, us, dys, scaled, turned_us, columns,
        dots, ddots, ddots_sum, inner, strict, enter, leave, leave_w, r_in, r_out, room, through,
    ) = parts(memory, counts)  # fmt: skip
    x, dy, k, q, gates, weights, diagonal, skip, ranks, initial, dfinal, marks = borrow(
        x, dy, k, q, gates, weights, diagonal, skip, ranks, initial, dfinal, marks
    )
    dx, dk, dq, da, dw, dd, dinitial, sums = borrow(dx, dk, dq, da, dw, dd, dinitial, sums)
    masks(rank, slab, own, earlier)
    step = (1 + (rank if ranks.size > 0 else 0)) * width
    for task in range(first, last):
        segment = task // pieces
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = task_heads(task % pieces, heads, groups, share)
        part = task % pieces % (pieces // groups)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            begin_state(big, dstates, base, area, dfinal, outer, width, size)
            for i in range((segment * heads + head) * step, (segment * heads + head + 1) * step):
                sums[i] = 0.0
        for t0 in range((count - 1) // block * block, -1, -block):
            slabs = (min(block, count - t0) + slab - 1) // slab
            for s in range(slabs):
                many, token = min(slab, count - t0 - s * slab), row * length + begin + t0 + s * slab
                load_rows(ks, s * deep, lanes, k, k_step, token, group, many, rank, size)
                load_rows(qs, s * deep, lanes, q, q_step, token, group, many, rank, size)
                turn_panels(big, turned, s * deep, ks, s * deep, size)
                scores(big, tall, dots, s * AREA, qs, s * deep, turned, s * deep, size)
            clear(dk_sum, 0, slabs * deep)
            clear(dq_sum, 0, slabs * deep)
            clear(ddots_sum, 0, slabs * AREA)
            for head in range(head_begin, head_end):
                outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
                entered, entered_at = states, 0
                next_head, next_t = (
                    (head + 1, t0) if head + 1 < head_end else (head_begin, max(t0 - block, 0))
                )
                coming = ((number + next_t // block - 1) * heads + next_head) * area
                ask = lanes * wide // (SLABS * ROWS) if next_t > 0 else 0
                if t0 > 0:
                    entered, entered_at = marks, ((number + t0 // block - 1) * heads + head) * area
                else:
                    begin_state(big, states, 0, area, initial, outer, width, size)
                for s in range(slabs):
                    many, token = min(slab, count - t0 - s * slab), row * length + begin + t0 + s * slab
                    load_values(us, s * narrow, wide, x, x_step, token, head, ranks, many, rank, width)
                    load_rows(dys, s * narrow, wide, dy, dy_step, token, head, many, rank, width)
                    if s + 1 == slabs:
                        break
                    end = forward_decays(
                        gates, weights, diagonal, token * heads + head, heads, many, rank, own, inner, enter, leave
                    )  # fmt: skip
                    for i in range(many * rank):
                        copy(scaled, i * wide, us, s * narrow + i * wide, wide, leave[i])
                    state, state_at = (states, s * area) if s > 0 else (entered, entered_at)
                    for c in range(0, long, lanes):
                        product_added(
                            big, states, (s + 1) * area + c * wide, state, state_at + c * wide, end,
                            scaled, 0, 1, wide, ks, s * deep + c * ROWS, wide, many * rank, (ks, 0, 0, 0),
                        )  # fmt: skip
                copy(through, 0, skip, head * width, width, ONE)
                for s in range(slabs - 1, -1, -1):
                    many, token = min(slab, count - t0 - s * slab), row * length + begin + t0 + s * slab
                    rows, at, of, on = many * rank, token * heads + head, s * deep, s * narrow
                    next_token = token - t0 + next_t
                    end = _backward_decays(
                        gates, weights, diagonal, at, heads, many, rank, own, inner, strict, enter, leave, leave_w
                    )  # fmt: skip
                    turn(turned_us, 0, LANES, us, on, wide, ROWS, wide)
                    product(tall, ddots, 0, dys, on, wide, turned_us, 0, width)
                    _paths_within(
                        inner, strict, dots, ddots, ddots_sum, s * AREA, room, weights, at, heads, many, rank,
                        own, earlier, da, dw, dd,
                    )  # fmt: skip
                    for i in range(ROWS):
                        copy(scaled, i * wide, dys, on + i * wide, wide, enter[i])
                    state, state_at = (states, s * area) if s > 0 else (entered, entered_at)
                    through_state(
                        big, tall, columns, 0, dstates, base, turned, of, leave_w, dys, on, wide, inner, size, rows,
                        (dx, (token * heads + head) * width, heads * width, width),
                        (x, next_token * x_step[0] + next_head * x_step[1], x_step[0], width),
                    )  # fmt: skip
                    passing = ZERO
                    clear(r_in, 0, LANES)
                    clear(r_out, 0, LANES)
                    for c in range(0, long, lanes):  # what is read of the states stays in the first cache
                        at_s, at_d, of_c = state_at + c * wide, base + c * wide, of + c * ROWS
                        passing += _inner(big, state, at_s, dstates, at_d, lanes * wide, room)
                        _product_weighed(
                            big, dk_sum, of_c, leave_w, r_out, ks, us, on, wide, dstates, at_d, width,
                            (dy, next_token * dy_step[0] + next_head * dy_step[2], dy_step[0], width if c == 0 else 0),
                        )  # fmt: skip
                        _product_weighed(
                            big, dq_sum, of_c, enter, r_in, qs, dys, on, wide, state, at_s, width, (ks, 0, 0, 0)
                        )  # fmt: skip
                        product_added(
                            big, dstates, at_d, dstates, at_d, end, scaled, 0, 1, wide, qs, of_c, wide, rows,
                            (marks, coming + (s * long + c) * wide // SLABS, ask, ask),
                        )  # fmt: skip
                    for i in range(ROWS):
                        r_in[i] *= enter[i]
                        r_out[i] *= leave[i]
                    _paths_beyond(end * passing, r_in, r_out, weights, at, heads, many, rank, da, dw)
                    turn(scaled, 0, wide, columns, 0, LANES, wide, LANES)
                    _value_gradients(
                        scaled, dys, us, on, x, x_step, token, head, heads, many, rank, ranks, width, wide, through,
                        turned_us, dx, sums, (segment * heads + head) * step,
                    )  # fmt: skip
            for s in range(slabs):
                many, token = min(slab, count - t0 - s * slab), row * length + begin + t0 + s * slab
                for c in range(0, long, lanes):
                    at, rows = s * deep + c * ROWS, many * rank
                    product_added(
                        big, dq_sum, at, dq_sum, at, ONE, ddots_sum, s * AREA, LANES, 1, ks, at, ROWS, rows,
                        (ks, 0, 0, 0),
                    )  # fmt: skip
                    product_added(
                        big, dk_sum, at, dk_sum, at, ONE, ddots_sum, s * AREA, 1, LANES, qs, at, ROWS, rows,
                        (ks, 0, 0, 0),
                    )  # fmt: skip
                    for i in range(rows if c < size else 0):
                        target = (((part * tokens + token) * rank + i) * groups + group) * size + c
                        copy(dk, target, dk_sum, at + i * lanes, min(lanes, size - c), ONE)
                        copy(dq, target, dq_sum, at + i * lanes, min(lanes, size - c), ONE)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            end_state(big, dinitial, outer, dstates, base, width, size)
    memory[0] = ZERO  # it is needed until here
