"""The sums of many programs' parts of gradients, in a fixed order: no atomics, two runs are equal bit for bit."""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.triton_launch import Launch
from plait.ops.triton_support import cdiv

_SIZES = ["parts", "stride", "columns", "width", "channels"]
_ROWS = 32
_COLUMNS = 64


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    parts_p, matrix_p, vector_p, parts, stride, columns, width, channels, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over parts (parts, stride): column j * channels + c to matrix[c, j] for j < width, then to vector[c]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        at = parts_p + row[:, None].to(tl.int64) * stride + column[None, :]
        total += tl.load(at, mask=(row < parts)[:, None] & real[None, :], other=0.0)
    v = tl.sum(total, 0)
    j = column // channels
    c = column % channels
    tl.store(matrix_p + c * width + j, v.to(matrix_p.dtype.element_ty), mask=real & (j < width))
    tl.store(vector_p + c, v.to(vector_p.dtype.element_ty), mask=real & (j >= width))


@triton.jit(do_not_specialize=["parts", "columns"])
def totals_kernel(
    parts_p, first_p, second_p, third_p, parts, columns, SECOND: tl.constexpr, THIRD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over parts (tensors, parts, columns): those of the first tensor to `first`, and so on; as many as there are.

    Launched on `totals_grid`; needs ROWS and COLUMNS of `TOTALS`.
    """
    which = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    at = parts_p + tl.cast(which, tl.int64) * parts * columns + column[None, :]
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < parts)[:, None] & real[None, :]
        total += tl.load(at + row[:, None].to(tl.int64) * columns, mask=mask, other=0.0)
    v = tl.sum(total, 0)
    tl.store(first_p + column, v.to(first_p.dtype.element_ty), mask=real & (column * 0 + which == 0))
    if SECOND:
        tl.store(second_p + column, v.to(second_p.dtype.element_ty), mask=real & (column * 0 + which == 1))
    if THIRD:
        tl.store(third_p + column, v.to(third_p.dtype.element_ty), mask=real & (column * 0 + which == 2))


TOTALS = {"ROWS": 128, "COLUMNS": 16}


def totals_grid(columns: int, tensors: int = 1) -> tuple[int, int, int]:
    """The grid of `totals_kernel`."""
    return cdiv(columns, TOTALS["COLUMNS"]), tensors, 1


def sum_parts(parts: int, stride: int, width: int, channels: int, *, vector: bool = False) -> Launch:
    """A launch that adds up `parts` rows of `stride` numbers: call it on them (float32) and where the sums go.

    The first W * C of a row go to a contiguous matrix (C, W), with `vector` the next C to a vector (C); without it any
    tensor may stand in its place.
    """
    columns = (width + vector) * channels
    numbers = (parts, stride, columns, width, channels)
    return Launch(_sum_kernel, cdiv(columns, _COLUMNS), numbers, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
