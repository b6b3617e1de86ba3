"""The sum of many programs' parts of a gradient, in a fixed order: no atomics, two runs are equal bit for bit."""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.triton_support import cdiv, on_device

_ROWS = 16
_COLUMNS = 128


@triton.jit(do_not_specialize=["parts", "columns", "width", "channels"])
def _sum_kernel(
    parts_p, matrix_p, vector_p, parts, columns, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Column j * channels + c of parts (parts, columns) goes to matrix[c, j] for j < width, then to vector[c]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        at = parts_p + row[:, None].to(tl.int64) * columns + column[None, :]
        total += tl.load(at, mask=(row < parts)[:, None] & real[None, :], other=0.0)
    v = tl.sum(total, 0)
    j = column // channels
    c = column % channels
    tl.store(matrix_p + c * width + j, v.to(matrix_p.dtype.element_ty), mask=real & (j < width))
    tl.store(vector_p + c, v.to(vector_p.dtype.element_ty), mask=real & (j >= width))


def sum_parts(parts: Tensor, matrix: Tensor, vector: Tensor | None = None) -> None:
    """Add up parts (R, W * C), or with a vector (R, (W + 1) * C), float32, into matrix (C, W) and vector (C)."""
    channels = matrix.shape[0]
    columns = matrix.numel() + (0 if vector is None else channels)
    if columns == 0:
        return
    with on_device(parts):
        _sum_kernel[(cdiv(columns, _COLUMNS),)](
            parts, matrix, matrix if vector is None else vector, parts.numel() // columns, columns,
            matrix.numel() // channels, channels, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
