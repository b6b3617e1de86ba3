"""A residual sum and its RMS norm as Numba kernels: one pass over the memory forward, one backward.

R rows of E channels:  s = x + y,  r = 1 / sqrt(mean(s^2) + eps),  n = s r w
    ds += r (dn w - s r^2 m),  m = mean(s dn w);  dw = sum over rows of dn s r;  dx = dy = ds

The second reading of a row comes from the first-level cache; r is kept for the backward. A task is a run of ROWS rows,
with its own sum for dw. An array that may be None is left out by the compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import KERNEL, LANES, PIECE, first, load, prefetch, store, total, zeros

TILES = "e7660550"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
ROWS = 64
AHEAD = 2  # rows: how far ahead memory is asked for
_ONE = np.float32(1.0)


@njit(**PIECE)
def _add(x: Any, at: int, y: Any, y_at: int, s: Any, to: int, lanes: Any) -> Any:
    """s, and its square as s keeps it."""
    store(s, to, load(x, at, lanes) + load(y, y_at, lanes), lanes)
    u = load(s, to, lanes)
    return u * u


@njit(**KERNEL)
def forward(
    begin_task: int, end_task: int, n: int, channels: int, x: Any, x_step: int, y: Any, y_step: int, w: Any, s: Any,
    normed: Any, scales: Any, eps: Any,
) -> None:  # fmt: skip
    """Fill s, normed (R, E) and scales (R,), r of every row, from x, y (R, E) and w (E,) float32; R is n, E channels.

    All arrays are flat, float32 or uint16 (bfloat16) each; x and y have x_step and y_step elements a row; eps float32.
    """
    whole, rest = channels - channels % LANES, first(channels % LANES)
    for row in range(begin_task * ROWS, min(end_task * ROWS, n)):
        at, y_at, to = row * x_step, row * y_step, row * channels
        squares = zeros()
        for c in range(0, whole, LANES):
            prefetch(x, at + AHEAD * x_step + c)
            prefetch(y, y_at + AHEAD * y_step + c)
            squares = squares + _add(x, at + c, y, y_at + c, s, to + c, None)
        if whole < channels:
            squares = squares + _add(x, at + whole, y, y_at + whole, s, to + whole, rest)
        r = _ONE / np.sqrt(total(squares) / np.float32(channels) + eps)
        scales[row] = r
        for c in range(0, whole, LANES):
            store(normed, to + c, load(s, to + c, None) * r * load(w, c, None), None)
        if whole < channels:
            store(normed, to + whole, load(s, to + whole, rest) * r * load(w, whole, rest), rest)


@njit(**PIECE)
def _inner(dn: Any, dn_at: int, s: Any, at: int, w: Any, sums: Any, c: int, r: Any, lanes: Any) -> Any:
    """The summand of m; adds dn s r to the sums of dw."""
    product = load(s, at, lanes) * load(dn, dn_at, lanes)
    store(sums, c, load(sums, c, lanes) + product * r, lanes)
    return product * load(w, c, lanes)


@njit(**PIECE)
def _outer(
    dn: Any, dn_at: int, ds: Any, ds_at: int, s: Any, at: int, w: Any, c: int, r: Any, pull: Any, dx: Any, dy: Any,
    lanes: Any,
) -> None:  # fmt: skip
    """dx and dy; pull = r^3 m."""
    d = load(dn, dn_at, lanes) * load(w, c, lanes) * r - load(s, at, lanes) * pull
    if ds is not None:
        d = d + load(ds, ds_at, lanes)
    store(dx, at, d, lanes)
    if dy is not None:
        store(dy, at, d, lanes)


@njit(**KERNEL)
def backward(
    begin_task: int, end_task: int, n: int, channels: int, dn: Any, dn_step: int, ds: Any, ds_step: int, s: Any,
    w: Any, scales: Any, dx: Any, dy: Any, sums: Any,
) -> None:  # fmt: skip
    """Fill dx and dy (R, E) and sums (tasks, E), the sum of dw over each task's rows.

    ds is an array or None for zeros; dy None if it is dx; the rest as in `forward`.
    """
    whole, rest = channels - channels % LANES, first(channels % LANES)
    own = np.zeros(channels, np.float32)
    for task in range(begin_task, end_task):
        own[:] = 0
        for row in range(task * ROWS, min((task + 1) * ROWS, n)):
            at, dn_at, ds_at = row * channels, row * dn_step, row * ds_step
            r, products = scales[row], zeros()
            for c in range(0, whole, LANES):
                prefetch(s, at + AHEAD * channels + c)
                prefetch(dn, dn_at + AHEAD * dn_step + c)
                if ds is not None:
                    prefetch(ds, ds_at + AHEAD * ds_step + c)
                products = products + _inner(dn, dn_at + c, s, at + c, w, own, c, r, None)
            if whole < channels:
                c = whole
                products = products + _inner(dn, dn_at + c, s, at + c, w, own, c, r, rest)
            pull = total(products) / np.float32(channels) * (r * r * r)
            for c in range(0, whole, LANES):
                _outer(dn, dn_at + c, ds, ds_at + c, s, at + c, w, c, r, pull, dx, dy, None)
            if whole < channels:
                c = whole
                _outer(dn, dn_at + c, ds, ds_at + c, s, at + c, w, c, r, pull, dx, dy, rest)
        sums[task * channels : (task + 1) * channels] = own
