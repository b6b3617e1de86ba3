"""A residual sum and its RMS norm on GPUs: the Triton kernels of gpu_kernels.py; the sum alone is kept for backward.

Two runs are equal bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from plait.ops.add_norm.gpu_kernels import backward_kernel, forward_kernel
from plait.ops.gated_norm.gpu import BACKWARD, FORWARD, TILE, WIDE, Call
from plait.ops.triton_launch import Launch
from plait.ops.triton_sums import sum_parts
from plait.ops.triton_support import KernelOp, cdiv, multiprocessors, power_of_2


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, y (..., E), weight (E) -> the norm in ``dtype`` and the sum, both (..., E)."""
    normed, s = ADD_NORM_OP(x, y, weight, eps, dtype)
    return normed, s


def _forward(
    x: Tensor, y: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    normed, s = _fake_forward(x, y, weight, eps, dtype)
    if s.numel():
        w = x if weight is None else weight.contiguous()
        key = (s.numel() // s.shape[-1], s.shape[-1], eps, weight is not None)
        _forward_call(*key, x.device, (x.dtype, y.dtype, w.dtype, dtype)).launch(
            x.contiguous(), y.contiguous(), w, s, normed
        )
    return normed, s


def _fake_forward(
    x: Tensor, y: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)),
    )


def _backward(
    dn: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y (empty where it is x's) and weight (empty for None)."""
    dx, dy, dweight = grads = _fake_backward(dn, ds, s, weight, eps, x_dtype, y_dtype)
    if s.numel() == 0:
        dweight.zero_()
        return grads
    w = s if weight is None else weight.contiguous()
    given = dn.contiguous(), s if ds is None else ds.contiguous()
    flags = (weight is not None, ds is not None, x_dtype != y_dtype)
    dtypes = (*(t.dtype for t in given), s.dtype, w.dtype, x_dtype, y_dtype)
    call = _backward_call(s.numel() // s.shape[-1], s.shape[-1], eps, flags, s.device, dtypes)
    parts = dweight if weight is None else s.new_empty(call.parts, dtype=torch.float32)
    call.launch(*given, s, w, dx, dy, parts)
    if call.add is not None:
        call.add(parts, dweight, parts)
    return grads


def _fake_backward(
    dn: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        s.new_empty(s.shape, dtype=x_dtype),
        s.new_empty(0 if x_dtype == y_dtype else s.shape, dtype=y_dtype),
        s.new_empty(0) if weight is None else weight.new_empty(weight.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.dtypes = x.dtype, y.dtype


def _gradients(ctx: Any, backward: Any, dn: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    s, weight = ctx.saved_tensors
    of_x, of_y = ctx.dtypes
    if dn is None:
        return (None,) * 5 if ds is None else (ds.to(of_x), ds.to(of_y), None, None, None)
    dx, dy, dweight = backward(dn, ds, s, weight, ctx.eps, of_x, of_y)
    return dx, dx if of_x == of_y else dy, None if weight is None else dweight, None, None


ADD_NORM_OP = KernelOp(
    "add_norm_gpu",
    _forward,
    _backward,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
"""The sum and its norm with their gradient."""


@lru_cache(maxsize=1024)
def _forward_call(
    rows: int, size: int, eps: float, weight: bool, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> Call:
    columns = power_of_2(size)
    tile = max(TILE // columns, 1)
    c = FORWARD.get(tile * columns, WIDE)
    return Call(
        Launch(
            forward_kernel, cdiv(rows, tile * c.tiles), (rows, size, eps, c.tiles), ROWS=tile, COLUMNS=columns,
            WEIGHT=weight, num_warps=c.warps,
        )
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _backward_call(
    rows: int, size: int, eps: float, flags: tuple[bool, bool, bool], device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> Call:  # fmt: skip
    weight, given, both = flags
    columns = power_of_2(size)
    tile = max(TILE // columns, 1)
    c = BACKWARD.get(tile * columns, WIDE)
    programs = min(multiprocessors(device) * c.tiles, cdiv(rows, tile))
    launch = Launch(
        backward_kernel, programs, (rows, size, eps), ROWS=tile, COLUMNS=columns, WEIGHT=weight, SUM=given, BOTH=both,
        num_warps=c.warps,
    )  # fmt: skip
    return Call(launch, programs * size, sum_parts(programs, size, 1, size)) if weight else Call(launch)
