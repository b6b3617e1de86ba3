"""A residual sum and its RMS norm on CPUs: custom ops around the Numba kernels. The sum and a scale a row are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.ops.add_norm import cpu_kernels
from plait.ops.numba_run import direct, flat, rows, run, weights

_KNOWN = (torch.float32, torch.bfloat16)


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, y (..., E), weight (E) -> the norm in ``dtype`` and the sum, both (..., E)."""
    shape = (x.shape[:-1].numel(), x.shape[-1])
    kind = torch.promote_types(x.dtype, y.dtype)
    x, y = (t if t.dtype in _KNOWN else t.float() for t in (x, y))
    made = dtype if dtype in _KNOWN else torch.float32
    normed, s, _ = direct(_forward, _compute, x.reshape(shape), y.reshape(shape), weight, eps, made)
    return normed.view(x.shape).to(dtype), s.view(x.shape).to(kind)


def _compute(
    x: Tensor, y: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y (R, E), weight (E) -> the norm and the sum (R, E), r (R,)."""
    normed, s, scales = _outputs(x, y, weight, eps, dtype)
    run(
        cpu_kernels.forward,
        _tasks(x),
        x.numel(),
        *x.shape,
        *rows(x),
        *rows(y),
        weights(x.shape[1], weight),
        *(flat(t) for t in (s, normed, scales)),
        np.float32(eps),
    )
    return normed, s, scales


_forward = torch.library.custom_op("plait::add_norm_cpu", _compute, mutates_args=(), device_types="cpu")


@_forward.register_fake
def _outputs(
    x: Tensor, y: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the norm, the sum and the scales."""
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


@torch.library.custom_op("plait::add_norm_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dn: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    scales: Tensor,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y (R, E; that of y is empty where it is x's) and weight (E; empty for None)."""
    dx, dy, dweight = _gradients(dn, ds, s, weight, scales, x_dtype, y_dtype)
    sums = torch.empty(_tasks(s), s.shape[1])
    run(
        cpu_kernels.backward,
        _tasks(s),
        s.numel(),
        *s.shape,
        *rows(dn),
        *((None, 0) if ds is None else rows(ds)),
        flat(s),
        weights(s.shape[1], weight),
        flat(scales),
        flat(dx),
        None if x_dtype == y_dtype else flat(dy),
        flat(sums),
    )
    if weight is not None:
        # numpy adds the tasks' sums one after the other, whatever the number of threads
        dweight.copy_(torch.from_numpy(sums.numpy().sum(0)))
    return dx, dy, dweight


@_backward.register_fake
def _gradients(
    dn: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    scales: Tensor,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients."""
    return (
        s.new_empty(s.shape, dtype=x_dtype),
        s.new_empty(0 if x_dtype == y_dtype else s.shape, dtype=y_dtype),
        s.new_empty(0) if weight is None else weight.new_empty(weight.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, weight, _, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.dtypes = x.dtype, y.dtype


def _differentiate(ctx: Any, dn: Tensor | None, ds: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    s, weight, scales = ctx.saved_tensors
    of_x, of_y = ctx.dtypes
    if dn is None:
        return (None,) * 5 if ds is None else (ds.to(of_x), ds.to(of_y), None, None, None)
    dx, dy, dweight = _backward(dn, ds, s, weight, scales, of_x, of_y)
    return dx, dx if of_x == of_y else dy, None if weight is None else dweight, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def _tasks(x: Tensor) -> int:
    return -(-x.shape[0] // cpu_kernels.ROWS)
