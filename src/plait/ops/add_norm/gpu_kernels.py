"""A residual sum and its RMS norm in Triton: one pass forward, one pass backward.

    s = x + y,  r = 1 / sqrt(mean(s^2) + eps),  n = s r w
    ds += r (dn w - s r^2 m),  m = mean(s dn w);  dw = sum over rows of dn s r;  dx = dy = ds

A program has ROWS rows of all E channels at a time, in registers. All tensors are contiguous. The backward computes r
again, which costs no memory: it has read the row anyway.
"""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "tiles"])
def forward_kernel(
    x_p, y_p, w_p, s_p, n_p, rows, size, eps, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """A program: `tiles` tiles of ROWS rows of `size` channels."""
    first = tl.program_id(0) * (tiles * ROWS)
    columns = tl.arange(0, COLUMNS)
    if WEIGHT:
        w = tl.load(w_p + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
    for tile in range(tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * size + columns[None, :]
        real = (row < rows)[:, None] & (columns < size)[None, :]
        x = tl.load(x_p + at, mask=real, other=0.0).to(tl.float32)
        s = (x + tl.load(y_p + at, mask=real, other=0.0).to(tl.float32)).to(s_p.dtype.element_ty)
        tl.store(s_p + at, s, mask=real)
        u = s.to(tl.float32)
        n = u * tl.rsqrt(tl.sum(u * u, 1) / size + eps)[:, None]
        if WEIGHT:
            n *= w
        tl.store(n_p + at, n.to(n_p.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dn_p, ds_p, s_p, w_p, dx_p, dy_p, parts_p, rows, size, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr, SUM: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """A program: every P-th tile, P programs; its part of dw: parts (P, E). SUM: ds is given; BOTH: dy is not dx."""
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if WEIGHT:
        w = tl.load(w_p + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * size + columns[None, :]
        real = (row < rows)[:, None] & (columns < size)[None, :]
        u = tl.load(s_p + at, mask=real, other=0.0).to(tl.float32)
        g = tl.load(dn_p + at, mask=real, other=0.0).to(tl.float32)
        weighted = g
        if WEIGHT:
            weighted = g * w
        scale = tl.rsqrt(tl.sum(u * u, 1) / size + eps)[:, None]
        mean = (tl.sum(weighted * u, 1) / size)[:, None]
        d = scale * weighted - u * (mean * (scale * scale * scale))
        if SUM:
            d += tl.load(ds_p + at, mask=real, other=0.0).to(tl.float32)
        tl.store(dx_p + at, d.to(dx_p.dtype.element_ty), mask=real)
        if BOTH:
            tl.store(dy_p + at, d.to(dy_p.dtype.element_ty), mask=real)
        if WEIGHT:
            sums += g * (u * scale)
    if WEIGHT:
        at = parts_p + tl.program_id(0).to(tl.int64) * size + columns
        tl.store(at, tl.sum(sums, 0), mask=columns < size)
