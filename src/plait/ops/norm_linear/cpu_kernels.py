"""The Numba kernel of a linear map of few rows, with the norm before it and the residual after it.

    y_o = residual_o + bias_o + sum over d of W_od u_d,   u = x r w,   r = 1 / sqrt(mean(x^2) + eps) over a group

It takes as long as the weights take from memory. A task is some outputs: it makes u of every row anew, which is
little beside its weights, and goes through them once, some rows of W and of u at a time in registers. Weights are
float32, or bfloat16 widened on the way; sums are float32, in an order that does not depend on the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import PIECE, load, prefetch, store, total, zeros
from plait.ops.numba_support import first as first_lanes
from plait.ops.numba_team import Kernel, doubles, floats, halves, integers
from plait.ops.tile_math import row_read, rowwise, tile_zero
from plait.ops.tiles import LANES, copy, tile_dots

TILES = "dc2e9b06"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
_ONE = np.float32(1)
_ALONE, _LONG, _SQUARE = ((0,),), ((0,),) * 8, ((0,),) * 4
"""Rows of W at once: one, or eight, with one row of u; four with four rows of u"""
TOGETHER = 4
"""rows of u"""


@njit(**PIECE)
def widen(into: Any, at: int, address: int, narrow: int, begin: int, count: int) -> None:
    """into[at + i] = what is at begin + i in the memory at an address, float32 or (narrow) bfloat16, for i < count."""
    if narrow:
        copy(into, at, halves(address), begin, count, _ONE)
    else:
        copy(into, at, floats(address), begin, count, _ONE)


@njit(**PIECE)
def narrowed(address: int, narrow: int, begin: int, given: Any, at: int, count: int) -> None:
    """The reverse of `widen`."""
    if narrow:
        copy(halves(address), begin, given, at, count, _ONE)
    else:
        copy(floats(address), begin, given, at, count, _ONE)


@njit(**PIECE)
def added(into: Any, room: Any, address: int, narrow: int, begin: int, count: int) -> None:
    """into[i] += what is at begin + i in the memory at an address; `room` is overwritten."""
    widen(room, 0, address, narrow, begin, count)
    for i in range(count):
        into[i] += room[i]


@njit(**PIECE)
def _normalise(u: Any, at: int, channels: int, size: int, eps: Any, weight: int) -> None:
    """u r w in place, for every group of `size` channels; weight 0: w is one."""
    for begin in range(at, at + channels, size):
        squares, end = zeros(), begin + size
        for c in range(begin, end - LANES + 1, LANES):
            v = load(u, c, None)
            squares = squares + v * v
        rest = size % LANES
        if rest > 0:
            v = load(u, end - rest, first_lanes(rest))
            squares = squares + v * v
        scale = np.float32(_ONE / np.sqrt(total(squares) / np.float32(size) + eps))
        for c in range(begin, end - LANES + 1, LANES):
            store(u, c, load(u, c, None) * scale, None)
        if rest > 0:
            store(u, end - rest, load(u, end - rest, first_lanes(rest)) * scale, first_lanes(rest))
    if weight != 0:
        w = floats(weight)
        whole = channels - channels % LANES
        for c in range(0, whole, LANES):
            store(u, at + c, load(u, at + c, None) * load(w, c, None), None)
        for c in range(whole, channels):
            u[at + c] *= w[c]


@njit(**PIECE)
def _one(r: int, carry: int, sums: Any, u: Any, w: Any, at: int, step: int, lanes: Any) -> Any:
    """One row of W with one vector of u."""
    prefetch(w, at + (r + 8) * step)
    return sums + row_read(w, at + r * step, lanes) * u, carry


@njit(**PIECE)
def _four(
    r: int, carry: int, s0: Any, s1: Any, s2: Any, s3: Any, u0: Any, u1: Any, u2: Any, u3: Any,
    w: Any, at: int, step: int, lanes: Any,
) -> Any:  # fmt: skip
    """One row of W with a vector of four rows of u."""
    prefetch(w, at + (r + TOGETHER) * step)
    v = row_read(w, at + r * step, lanes)
    return s0 + v * u0, s1 + v * u1, s2 + v * u2, s3 + v * u3, carry


@njit(**PIECE)
def dots(
    shape: Any, w: Any, at: int, step: int, channels: int, u: Any, from_: int, out: Any, to: int
) -> None:
    """out[to + r] += the product of row r of w and u, which has zeros after its channels."""
    sums = tile_zero(shape)
    whole = channels - channels % LANES
    for c in range(0, whole, LANES):
        sums, _ = rowwise(_one, 0, sums, row_read(u, from_ + c, None), w, at + c, step, None)
    if whole < channels:
        lanes = first_lanes(channels - whole)
        sums, _ = rowwise(_one, 0, sums, row_read(u, from_ + whole, None), w, at + whole, step, lanes)
    tile_dots(out, to, sums, row_read(out, 0, None))


@njit(**PIECE)
def _dots_of_four(
    shape: Any, w: Any, at: int, step: int, channels: int, u: Any, from_: int, long: int, out: Any, to: int, o: int
) -> None:  # fmt: skip
    """The same for four rows of u and of out, `long` and `o` numbers apart."""
    s0, s1, s2, s3 = tile_zero(shape), tile_zero(shape), tile_zero(shape), tile_zero(shape)
    whole = channels - channels % LANES
    for c in range(0, whole, LANES):
        b = from_ + c
        s0, s1, s2, s3, _ = rowwise(
            _four, 0, s0, s1, s2, s3, row_read(u, b, None), row_read(u, b + long, None),
            row_read(u, b + 2 * long, None), row_read(u, b + 3 * long, None), w, at + c, step, None,
        )  # fmt: skip
    if whole < channels:
        b, lanes = from_ + whole, first_lanes(channels - whole)
        s0, s1, s2, s3, _ = rowwise(
            _four, 0, s0, s1, s2, s3, row_read(u, b, None), row_read(u, b + long, None),
            row_read(u, b + 2 * long, None), row_read(u, b + 3 * long, None), w, at + whole, step, lanes,
        )  # fmt: skip
    ones = row_read(out, 0, None)
    tile_dots(out, to, s0, ones)
    tile_dots(out, to + o, s1, ones)
    tile_dots(out, to + 2 * o, s2, ones)
    tile_dots(out, to + 3 * o, s3, ones)


@njit(**PIECE)
def products(
    w: Any, at: int, step: int, count: int, channels: int, u: Any, long: int, rows: int, out: Any, o: int
) -> None:
    """out[LANES + i * o + r] = the product of row r of w, r < count, and row i of u, of `long` numbers.

    The first LANES of out are ones; rows is one, or a multiple of TOGETHER.
    """
    out[LANES:] = np.float32(0)
    if rows == 1:
        for r in range(0, count - 7, 8):
            dots(_LONG, w, at + r * step, step, channels, u, 0, out, LANES + r)
        for r in range(count - count % 8, count):
            dots(_ALONE, w, at + r * step, step, channels, u, 0, out, LANES + r)
    else:
        for r in range(0, count - 3, 4):
            for i in range(0, rows, TOGETHER):
                _dots_of_four(
                    _SQUARE, w, at + r * step, step, channels, u, i * long, long, out, LANES + i * o + r, o
                )
        for r in range(count - count % 4, count):
            for i in range(0, rows, TOGETHER):
                _dots_of_four(
                    _ALONE, w, at + r * step, step, channels, u, i * long, long, out, LANES + i * o + r, o
                )


def _product(first: Any, last: Any, words: Any) -> None:
    """Tasks first to last - 1; the words are those of `cpu.py`."""
    p, numbers = integers(words), doubles(words)
    rows, channels, outputs, share = p[0], p[1], p[2], p[3]
    long = (channels + LANES - 1) // LANES * LANES
    many = rows if rows == 1 else (rows + TOGETHER - 1) // TOGETHER * TOGETHER
    u, out, room = (
        np.zeros(many * long, np.float32),
        np.ones(LANES + many * share, np.float32),
        np.empty(share, np.float32),
    )
    for i in range(rows):
        widen(u, i * long, p[4], p[5], i * p[6], channels)
        if p[7] > 0:
            _normalise(u, i * long, channels, p[7], np.float32(numbers[8]), p[9])
    for task in range(first, last):
        begin = task * share
        count = min(share, outputs - begin)
        if p[11]:
            products(halves(p[10]), begin * p[12], p[12], count, channels, u, long, many, out, share)
        else:
            products(floats(p[10]), begin * p[12], p[12], count, channels, u, long, many, out, share)
        for i in range(rows):
            y = out[LANES + i * share :]
            if p[13] != 0:
                added(y, room, p[13], p[14], begin, count)
            if p[15] != 0:
                added(y, room, p[15], p[16], i * p[17] + begin, count)
            narrowed(p[18], p[19], i * outputs + begin, y, 0, count)


PRODUCT = Kernel("norm_linear_cpu", _product)
