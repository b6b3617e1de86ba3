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
    INLINE,
    ONE,
    OPTIONS,
    ROW,
    ROWS,
    SLABS,
    TINY,
    ZERO,
    begin_state,
    buffer,
    forward_decays,
    load_rows,
    load_values,
    masks,
    product,
    product_added,
    task_heads,
    through_state,
    times,
    turn,
    up,
    write,
)
from plait.ops.tile_math import row_read, row_write, tile_flush, tile_zero
from plait.ops.tiles import LANES, copy, lane_sum, prefetch

TILES = "d1aed343"
"""Of the files the kernels are made of: a change there must change this one too, or Numba takes old kernels."""


@njit(**INLINE)
def _inner(a: Any, a_at: int, b: Any, b_at: int, count: int, room: Any) -> Any:
    """The inner product of `count` numbers, a multiple of 16; room: for 16."""
    even = odd = tile_zero(ROW)
    for i in range(0, count, LANES):
        even, odd = odd, even + row_read(a, a_at + i, None) * row_read(b, b_at + i, None)
    row_write(room, 0, even + odd, None)
    return lane_sum(room, 0)


@njit(**INLINE)
def _add(out: Any, at: int, given: Any, given_at: int, count: int, factor: Any) -> None:
    """out += factor * given, `count` numbers, a multiple of 16."""
    for i in range(0, count, LANES):
        row_write(
            out, at + i, row_read(out, at + i, None) + row_read(given, given_at + i, None) * factor, None
        )


@njit(**OPTIONS)
def _backward_decays(
    gates, weights, diagonal, at, heads, many, rank, own, inner, strict, enter, leave, leave_w
):  # fmt: skip
    """inner, strict (16, 16): row i has W_ij, and L_ij of earlier tokens, over all j; enter c; leave e; leave_w e w."""
    inner[many * rank * LANES :] = ZERO
    strict[many * rank * LANES :] = ZERO
    enter[:] = ZERO
    leave[:] = ZERO
    across, c, e = tile_zero(ROW), 1.0, 1.0
    for t in range(many - 1, -1, -1):
        across = across + row_read(own, t * LANES, None) * weights[at + t * heads]
        leave[t * rank : (t + 1) * rank] = e
        e = times(e, gates[at + t * heads])
    older = just = tile_zero(ROW)
    for t in range(many):
        mine, gate = row_read(own, t * LANES, None), np.float32(gates[at + t * heads])
        older = tile_flush(older * gate, TINY) + just * gate
        c = times(c, gates[at + t * heads])
        enter[t * rank : (t + 1) * rank] = c
        line = older * across + mine * diagonal[at + t * heads]
        for r in range(t * rank, (t + 1) * rank):
            row_write(strict, r * LANES, older, None)
            row_write(inner, r * LANES, line, None)
        just = mine
    row_write(leave_w, 0, row_read(leave, 0, None) * across, None)
    return np.float32(c)


@njit(**OPTIONS)
def _paths_within(
    inner, strict, dots, dots_at, ddots, sums, weights, at, heads, many, rank, own, earlier, da, dw, dd
):  # fmt: skip
    """Turn `inner` into W q k (for du) and `ddots` into W dy u (for dq, dk); what a, w and d get within the slab."""
    cross, to_w, to_d, across = tile_zero(ROW), tile_zero(ROW), tile_zero(ROW), tile_zero(ROW)
    for t in range(many):
        across = across + row_read(own, t * LANES, None) * weights[at + t * heads]
    for t in range(many - 1, -1, -1):
        mine = row_read(own, t * LANES, None)
        for i in range(t * rank * LANES, (t + 1) * rank * LANES, LANES):
            dot, ddot, weight = (
                row_read(dots, dots_at + i, None),
                row_read(ddots, i, None),
                row_read(inner, i, None),
            )
            both = dot * ddot
            path = both * row_read(strict, i, None)
            to_w, to_d, cross = to_w + path, to_d + both * mine, cross + path * across
            row_write(inner, i, weight * dot, None)
            row_write(ddots, i, weight * ddot, None)
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
    length, heads, width, groups, size, rank, share, parts = sizes
    wide, long = up(width, ROWS), up(size, LANES * len(big[0]))
    area, slab = wide * long, ROWS // rank
    block, narrow, deep = SLABS * slab, ROWS * wide, ROWS * long
    tokens = da.size // max(heads, 1)
    own, earlier = masks(rank, slab)
    dstates, states = buffer(share * area), buffer(SLABS * area)
    ks, qs, turned = buffer(SLABS * deep), buffer(SLABS * deep), buffer(SLABS * deep)
    dk_sum, dq_sum, to_k, to_q = buffer(SLABS * deep), buffer(SLABS * deep), buffer(deep), buffer(deep)
    us, dys = buffer(SLABS * narrow), buffer(SLABS * narrow)
    scaled, scaled_us, turned_us, columns = buffer(narrow), buffer(narrow), buffer(narrow), buffer(narrow)
    dots, ddots = buffer(SLABS * AREA), buffer(AREA)
    inner, strict = buffer(AREA), buffer(AREA)
    enter, leave, leave_w = buffer(LANES), buffer(LANES), buffer(LANES)
    r_in, r_out, room = buffer(LANES), buffer(LANES), buffer(2 * LANES)
    through = buffer(wide)
    step = (1 + (rank if ranks.size > 0 else 0)) * width
    for task in range(first, last):
        segment = task // parts
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = task_heads(task % parts, heads, groups, share)
        part = task % parts % (parts // groups)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            begin_state(dstates, base, area, dfinal, outer, width, size, long)
            sums[(segment * heads + head) * step : (segment * heads + head + 1) * step] = ZERO
        for t0 in range((count - 1) // block * block, -1, -block):
            slabs = (min(block, count - t0) + slab - 1) // slab
            for s in range(slabs):
                many, token = min(slab, count - t0 - s * slab), row * length + begin + t0 + s * slab
                load_rows(ks, s * deep, long, k, k_step, token, group, many, rank, size)
                load_rows(qs, s * deep, long, q, q_step, token, group, many, rank, size)
                turn(turned, s * deep, LANES, ks, s * deep, long, ROWS, long)
                product(
                    tall, dots, s * AREA, LANES, qs, s * deep, long, 1, turned, s * deep, LANES, ROWS, LANES, size
                )  # fmt: skip
            dk_sum[: slabs * deep] = ZERO
            dq_sum[: slabs * deep] = ZERO
            for head in range(head_begin, head_end):
                outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
                entered, entered_at = states, 0
                coming = (
                    (number + t0 // block - 1) * heads + head + 1
                ) * area  # the state that is needed next
                if head + 1 == head_end:
                    coming -= (heads + share) * area
                if t0 > 0:
                    entered, entered_at = marks, ((number + t0 // block - 1) * heads + head) * area
                else:
                    begin_state(states, 0, area, initial, outer, width, size, long)
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
                    product_added(
                        big, states, (s + 1) * area, state, state_at, long, end, scaled, 0, 1, wide,
                        ks, s * deep, long, wide, long, many * rank,
                    )  # fmt: skip
                copy(through, 0, skip, head * width, width, ONE)
                for s in range(slabs - 1, -1, -1):
                    many, token = min(slab, count - t0 - s * slab), row * length + begin + t0 + s * slab
                    rows, at, of, on = many * rank, token * heads + head, s * deep, s * narrow
                    end = _backward_decays(
                        gates, weights, diagonal, at, heads, many, rank, own, inner, strict, enter, leave, leave_w
                    )  # fmt: skip
                    turn(turned_us, 0, LANES, us, on, wide, ROWS, wide)
                    product(
                        tall, ddots, 0, LANES, dys, on, wide, 1, turned_us, 0, LANES, ROWS, LANES, width
                    )  # fmt: skip
                    _paths_within(
                        inner, strict, dots, s * AREA, ddots, room, weights, at, heads, many, rank, own, earlier,
                        da, dw, dd,
                    )  # fmt: skip
                    for t in range(many):
                        prefetch(dx, ((token + t) * heads + head) * width, width)
                    for i in range(ROWS):
                        copy(scaled_us, i * wide, us, on + i * wide, wide, leave[i])
                        copy(scaled, i * wide, dys, on + i * wide, wide, enter[i])
                    state, state_at = (states, s * area) if s > 0 else (entered, entered_at)
                    passing = ZERO
                    to_k[:] = ZERO
                    to_q[:] = ZERO
                    for p in range(0, wide, ROWS):  # what is read of the states stays in the first cache
                        at_s, at_d = state_at + p * long, base + p * long
                        if t0 > 0:
                            prefetch(marks, coming, area // (SLABS * wide // ROWS))
                            coming += area // (SLABS * wide // ROWS)
                        through_state(
                            tall, columns, p * LANES, dstates, at_d, long, turned, of, leave_w, dys, on + p, wide,
                            inner, 0, ROWS, size, rows,
                        )  # fmt: skip
                        product_added(  # as if all weights were 1, for their own gradient
                            big, to_k, 0, to_k, 0, long, ONE, scaled_us, p, wide, 1, dstates, at_d, long,
                            ROWS, long, ROWS,
                        )  # fmt: skip
                        passing += _inner(state, at_s, dstates, at_d, ROWS * long, room)
                        product_added(
                            big, to_q, 0, to_q, 0, long, ONE, scaled, p, wide, 1, state, at_s, long,
                            ROWS, long, ROWS,
                        )  # fmt: skip
                        product_added(
                            big, dstates, at_d, dstates, at_d, long, end, scaled, p, 1, wide, qs, of, long,
                            ROWS, long, rows,
                        )  # fmt: skip
                    for t in range(many):
                        for i in range(t * rank, (t + 1) * rank):
                            r_out[i] = _inner(to_k, i * long, ks, of + i * long, long, room)
                            r_in[i] = _inner(to_q, i * long, qs, of + i * long, long, room)
                            _add(dk_sum, of + i * long, to_k, i * long, long, weights[at + t * heads])
                            _add(dq_sum, of + i * long, to_q, i * long, long, ONE)
                    _paths_beyond(end * passing, r_in, r_out, weights, at, heads, many, rank, da, dw)
                    product_added(
                        big, dq_sum, of, dq_sum, of, long, ONE, ddots, 0, LANES, 1, ks, of, long, ROWS, long, rows
                    )  # fmt: skip
                    product_added(
                        big, dk_sum, of, dk_sum, of, long, ONE, ddots, 0, 1, LANES, qs, of, long, ROWS, long, rows
                    )  # fmt: skip
                    turn(scaled, 0, wide, columns, 0, LANES, wide, LANES)
                    _value_gradients(
                        scaled, dys, us, on, x, x_step, token, head, heads, many, rank, ranks, width, wide, through,
                        scaled_us, dx, sums, (segment * heads + head) * step,
                    )  # fmt: skip
            for s in range(slabs):
                many, token = min(slab, count - t0 - s * slab), row * length + begin + t0 + s * slab
                for i in range(many * rank):
                    target = (((part * tokens + token) * rank + i) * groups + group) * size
                    copy(dk, target, dk_sum, s * deep + i * long, size, ONE)
                    copy(dq, target, dq_sum, s * deep + i * long, size, ONE)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            for p in range(width):
                copy(dinitial, outer + p * size, dstates, base + p * long, size, ONE)
