"""The gated RMS norm as Numba kernels: one pass over the memory forward, one backward.

R rows of E channels, groups of K neighbouring ones. With s = silu(z), r = 1 / sqrt(mean(u^2) + eps) over a group:

    gate first:  u = x s, y = u r w;    du = r (dy w - u r^2 m);  dx = du s,  ds = du x     (arXiv 2405.21060)
    norm first:  u = x,   y = u r w s;  dx = r (dy w s - u r^2 m);            ds = dy u r w
    m = mean of u times what stands beside the u r^2 in the bracket;  dz = ds silu'(z)

A group is read twice, the second time from the first-level cache; r is kept for the backward. A task is a run of ROWS
rows, with its own sum for dw. z is an array or None, `norm_first` None or True: the compiler leaves out the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.numba_support import KERNEL, LANES, PIECE, first, load, prefetch, sigmoid, store, total, zeros

TILES = "e7660550"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
ROWS = 64
AHEAD = 2  # rows: how far ahead memory is asked for
_ONE = np.float32(1.0)


@njit(**PIECE)
def _square(x: Any, at: int, z: Any, z_at: int, kept: Any, c: int, norm_first: Any, lanes: Any) -> Any:
    """u^2; keeps what the second reading multiplies by r w: u, or u s."""
    u = load(x, at, lanes)
    if z is None:
        store(kept, c, u, None)
        return u * u
    gate = load(z, z_at, lanes)
    v = u * (gate * sigmoid(gate))
    store(kept, c, v, None)
    if norm_first is None:
        return v * v
    return u * u


@njit(**KERNEL)
def forward(
    begin_task: int, end_task: int, n: int, channels: int, x: Any, step: int, z: Any, z_step: int, w: Any, y: Any,
    scales: Any, size: int, eps: Any, norm_first: Any,
) -> None:  # fmt: skip
    """Fill y (R, E) and scales (R, E/K), r of every group, from x, z (R, E) and w (E,) float32; R is n, E channels.

    All arrays are flat; x and z have step and z_step elements a row. x, z and y are float32 or uint16 (bfloat16);
    size is K; eps float32.
    """
    groups, whole = channels // size, size - size % LANES
    kept, rest = np.zeros(size + LANES, np.float32), first(size % LANES)
    for row in range(begin_task * ROWS, min(end_task * ROWS, n)):
        for group in range(groups):
            c0 = group * size
            at, z_at, to = row * step + c0, row * z_step + c0, row * channels + c0
            squares = zeros()
            for c in range(0, whole, LANES):
                prefetch(x, at + AHEAD * step + c)
                if z is not None:
                    prefetch(z, z_at + AHEAD * z_step + c)
                squares = squares + _square(x, at + c, z, z_at + c, kept, c, norm_first, None)
            if whole < size:
                squares = squares + _square(x, at + whole, z, z_at + whole, kept, whole, norm_first, rest)
            r = _ONE / np.sqrt(total(squares) / np.float32(size) + eps)
            scales[row * groups + group] = r
            for c in range(0, whole, LANES):
                store(y, to + c, load(kept, c, None) * r * load(w, c0 + c, None), None)
            if whole < size:
                store(y, to + whole, load(kept, whole, None) * r * load(w, c0 + whole, rest), rest)


@njit(**PIECE)
def _inner(
    dy: Any, dy_at: int, x: Any, at: int, z: Any, z_at: int, w: Any, w_at: int, kept: Any, c: int, sums: Any, r: Any,
    norm_first: Any, lanes: Any,
) -> Any:  # fmt: skip
    """The summand of m, u (dy w s) or u (dy w) alike; keeps sigmoid(z), adds dy y / w to the sums of dw."""
    product = load(x, at, lanes) * load(dy, dy_at, lanes)
    if z is not None:
        gate = load(z, z_at, lanes)
        s = sigmoid(gate)
        store(kept, c, s, None)
        product = product * (gate * s)
    store(sums, w_at, load(sums, w_at, lanes) + product * r, lanes)
    return product * load(w, w_at, lanes)


@njit(**PIECE)
def _outer(
    dy: Any, dy_at: int, x: Any, at: int, z: Any, z_at: int, w: Any, w_at: int, kept: Any, c: int, r: Any, pull: Any,
    dx: Any, dz: Any, to: int, norm_first: Any, lanes: Any,
) -> None:  # fmt: skip
    """dx and dz; pull = r^3 m."""
    u, g = load(x, at, lanes), load(dy, dy_at, lanes) * load(w, w_at, lanes) * r
    if z is None:
        store(dx, to, g - u * pull, lanes)
        return
    gate, s = load(z, z_at, lanes), load(kept, c, None)
    silu = gate * s
    if norm_first is None:
        du = g - u * silu * pull
        store(dx, to, du * silu, lanes)
        dgate = du * u
    else:
        store(dx, to, g * silu - u * pull, lanes)
        dgate = g * u
    store(dz, to, dgate * (s * (_ONE + gate * (_ONE - s))), lanes)


@njit(**KERNEL)
def backward(
    begin_task: int, end_task: int, n: int, channels: int,
    dy: Any, dy_step: int, x: Any, step: int, z: Any, z_step: int,
    w: Any, scales: Any, dx: Any, dz: Any, sums: Any, size: int, norm_first: Any,
) -> None:  # fmt: skip
    """Fill dx, dz (R, E) and sums (tasks, E), the sum of dw over each task's rows.

    dy (R, E) has dy_step elements a row; dz is an array, or None with z; the rest as in `forward`.
    """
    groups, whole = channels // size, size - size % LANES
    kept, own, rest = np.zeros(size + LANES, np.float32), np.zeros(channels, np.float32), first(size % LANES)
    for task in range(begin_task, end_task):
        own[:] = 0
        for row in range(task * ROWS, min((task + 1) * ROWS, n)):
            for group in range(groups):
                c0 = group * size
                at, z_at, dy_at, to = (
                    row * step + c0,
                    row * z_step + c0,
                    row * dy_step + c0,
                    row * channels + c0,
                )
                r, products = scales[row * groups + group], zeros()
                for c in range(0, whole, LANES):
                    prefetch(x, at + AHEAD * step + c)
                    prefetch(dy, dy_at + AHEAD * dy_step + c)
                    if z is not None:
                        prefetch(z, z_at + AHEAD * z_step + c)
                    products = products + _inner(
                        dy, dy_at + c, x, at + c, z, z_at + c, w, c0 + c, kept, c, own, r, norm_first, None
                    )
                if whole < size:
                    c = whole
                    products = products + _inner(
                        dy, dy_at + c, x, at + c, z, z_at + c, w, c0 + c, kept, c, own, r, norm_first, rest
                    )
                pull = total(products) / np.float32(size) * (r * r * r)
                for c in range(0, whole, LANES):
                    _outer(
                        dy, dy_at + c, x, at + c, z, z_at + c, w, c0 + c, kept, c, r, pull, dx, dz, to + c,
                        norm_first, None,
                    )  # fmt: skip
                if whole < size:
                    c = whole
                    _outer(
                        dy, dy_at + c, x, at + c, z, z_at + c, w, c0 + c, kept, c, r, pull, dx, dz, to + c,
                        norm_first, rest,
                    )  # fmt: skip
        sums[task * channels : (task + 1) * channels] = own
