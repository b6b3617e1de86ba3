"""The gated RMS norm in Triton: one pass forward, one pass backward.

With s = silu(z), r = 1 / rms(u) and the mean over a group of channels:
    gate first:  u = x s, y = u r w;    g = dy w;    du = r (g - u r^2 mean(g u));  dx = du s,  ds = du x
    norm first:  u = x,   y = u r w s;  g = dy w s;  dx = r (g - u r^2 mean(g u));              ds = dy u r w

A program has one group of channels and ROWS rows at a time, all in registers. Rows are (outer, inner), with a stride
each: tensors are read where they lie, also as parts of a projection or heads of one; y, dx and dz are contiguous. The
backward computes r again, which costs no memory: it has read the row anyway.
"""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.selective_scan.gpu_tiles import sigmoid


@triton.jit
def load_tile(p, rows, row, inner, stride, inner_stride, columns, real):
    """A tile [ROWS, COLUMNS] of a tensor as it is in memory; p points at the group; `row` (ROWS)."""
    at = (row // inner).to(tl.int64) * stride + (row % inner).to(tl.int64) * inner_stride
    return tl.load(p + (at[:, None] + columns[None, :]), mask=(row < rows)[:, None] & real, other=0.0)


@triton.jit(do_not_specialize=["rows", "tiles"])
def forward_kernel(
    x_p, z_p, w_p, y_p, rows, inner, groups, size, x_r, x_i, z_r, z_i, eps, tiles, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, GATE: tl.constexpr, NORM_FIRST: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """A program: `tiles` tiles of ROWS rows of a group of `size` channels."""
    group = (tl.program_id(0) % groups).to(tl.int64)
    first = tl.program_id(0) // groups * (tiles * ROWS)
    columns = tl.arange(0, COLUMNS)
    real = (columns < size)[None, :]
    x_p += group * size
    z_p += group * size
    if WEIGHT:
        w = tl.load(w_p + group * size + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
    for tile in range(tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        u = load_tile(x_p, rows, row, inner, x_r, x_i, columns, real).to(tl.float32)
        if GATE:
            z = load_tile(z_p, rows, row, inner, z_r, z_i, columns, real).to(tl.float32)
            gate = z * sigmoid(z)
            if not NORM_FIRST:
                u *= gate
        scale = tl.rsqrt(tl.sum(u * u, 1) / size + eps)
        y = u * scale[:, None]
        if WEIGHT:
            y *= w
        if GATE and NORM_FIRST:
            y *= gate
        at = (row.to(tl.int64) * groups + group) * size
        where = (row < rows)[:, None] & real
        tl.store(y_p + (at[:, None] + columns[None, :]), y.to(y_p.dtype.element_ty), mask=where)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy_p, x_p, z_p, w_p, dx_p, dz_p, parts_p, rows, inner, groups, size, dy_r, dy_i, x_r, x_i, z_r, z_i,
    eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATE: tl.constexpr, NORM_FIRST: tl.constexpr,
    WEIGHT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A program: every P-th tile of a group, P programs a group; its part of dw: parts (P, E).

    AHEAD: the next tile is loaded before this one is worked on.
    """
    group = (tl.program_id(0) % groups).to(tl.int64)
    program = tl.program_id(0) // groups
    step = tl.num_programs(0) // groups * ROWS
    columns = tl.arange(0, COLUMNS)
    real = (columns < size)[None, :]
    dy_p += group * size
    x_p += group * size
    z_p += group * size
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if WEIGHT:
        w = tl.load(w_p + group * size + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
    row = program * ROWS + tl.arange(0, ROWS)
    if AHEAD:
        next_dy = load_tile(dy_p, rows, row, inner, dy_r, dy_i, columns, real)
        next_x = load_tile(x_p, rows, row, inner, x_r, x_i, columns, real)
        if GATE:
            next_z = load_tile(z_p, rows, row, inner, z_r, z_i, columns, real)
    for _first in range(program * ROWS, rows, step):
        if AHEAD:
            dy = next_dy.to(tl.float32)
            x = next_x.to(tl.float32)
            next_dy = load_tile(dy_p, rows, row + step, inner, dy_r, dy_i, columns, real)
            next_x = load_tile(x_p, rows, row + step, inner, x_r, x_i, columns, real)
            if GATE:
                z = next_z.to(tl.float32)
                next_z = load_tile(z_p, rows, row + step, inner, z_r, z_i, columns, real)
        else:
            dy = load_tile(dy_p, rows, row, inner, dy_r, dy_i, columns, real).to(tl.float32)
            x = load_tile(x_p, rows, row, inner, x_r, x_i, columns, real).to(tl.float32)
            if GATE:
                z = load_tile(z_p, rows, row, inner, z_r, z_i, columns, real).to(tl.float32)
        u = x
        g = dy
        if GATE:
            s = sigmoid(z)
            gate = z * s
            if NORM_FIRST:
                g = dy * gate
            else:
                u = x * gate
        weighted = g
        if WEIGHT:
            weighted = g * w
        scale = tl.rsqrt(tl.sum(u * u, 1) / size + eps)[:, None]
        mean = (tl.sum(weighted * u, 1) / size)[:, None]
        dx = scale * weighted - u * (mean * (scale * scale * scale))
        normed = u * scale
        if WEIGHT:
            sums += g * normed
        at = ((row.to(tl.int64) * groups + group) * size)[:, None] + columns[None, :]
        where = (row < rows)[:, None] & real
        if GATE:
            if NORM_FIRST:
                dgate = dy * normed
                if WEIGHT:
                    dgate *= w
            else:
                dgate = dx * x
                dx *= gate
            dz = dgate * (s + gate * (1.0 - s))
            tl.store(dz_p + at, dz.to(dz_p.dtype.element_ty), mask=where)
        tl.store(dx_p + at, dx.to(dx_p.dtype.element_ty), mask=where)
        row += step
    if WEIGHT:
        at = parts_p + (program.to(tl.int64) * groups + group) * size + columns
        tl.store(at, tl.sum(sums, 0), mask=columns < size)
