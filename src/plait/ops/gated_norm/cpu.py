"""The gated RMS norm on CPUs: two custom ops around the Numba kernels. Inputs and one scale a group are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.ops.gated_norm import cpu_kernels
from plait.ops.numba_run import direct, flat, rows, run, weights

_KNOWN = (torch.float32, torch.bfloat16)


def gated_norm(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x, z (..., E), weight (E) -> y (..., E); x float32 or bfloat16; z None: no gate, weight None: ones."""
    channels = x.shape[-1]
    shape = (x.shape[:-1].numel(), channels)
    made = (dtype or x.dtype) if (dtype or x.dtype) in _KNOWN else torch.float32
    if z is not None and z.dtype not in _KNOWN:
        z = z.float()
    y, _ = direct(
        _forward,
        _compute,
        x.reshape(shape),
        None if z is None else z.reshape(shape),
        weight,
        eps,
        group_size or channels,
        norm_before_gate,
        made,
    )
    return y.view(x.shape).to(dtype or x.dtype)


def _compute(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    size: int,
    norm_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x, z (R, E), weight (E) -> y (R, E), r (R, E/size)."""
    y, scales = _outputs(x, size, dtype)
    run(
        cpu_kernels.forward,
        _tasks(x),
        x.numel(),
        *x.shape,
        *rows(x),
        *((None, 0) if z is None else rows(z)),
        weights(x.shape[1], weight),
        flat(y),
        flat(scales),
        size,
        np.float32(eps),
        norm_first or None,
    )
    return y, scales


_forward = torch.library.custom_op("plait::gated_norm_cpu", _compute, mutates_args=(), device_types="cpu")


@_forward.register_fake
def _(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    size: int,
    norm_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, size, dtype)


@torch.library.custom_op("plait::gated_norm_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    scales: Tensor,
    size: int,
    norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, z (R, E) and weight (E); empty for what is None."""
    dx, dz, dweight = _gradients(x, z, weight)
    sums = torch.empty(_tasks(x), x.shape[1])
    run(
        cpu_kernels.backward,
        _tasks(x),
        x.numel(),
        *x.shape,
        *rows(dy),
        *rows(x),
        *((None, 0) if z is None else rows(z)),
        weights(x.shape[1], weight),
        flat(scales),
        flat(dx),
        None if z is None else flat(dz),
        flat(sums),
        size,
        norm_first or None,
    )
    if weight is not None:
        # numpy adds the tasks' sums one after the other, whatever the number of threads
        dweight.copy_(torch.from_numpy(sums.numpy().sum(0)))
    return dx, dz, dweight


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    scales: Tensor,
    size: int,
    norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, z, weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, z, weight, _, ctx.size, ctx.norm_first, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, z, weight, output[1])


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, weight, scales = ctx.saved_tensors
    if dy is None:
        return (None,) * 7
    dx, dz, dweight = _backward(dy, x, z, weight, scales, ctx.size, ctx.norm_first)
    return dx, None if z is None else dz, None if weight is None else dweight, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def _tasks(x: Tensor) -> int:
    return -(-x.shape[0] // cpu_kernels.ROWS)


def _outputs(x: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for y (R, E) and r (R, E/size)."""
    rows, channels = x.shape
    return x.new_empty(rows, channels, dtype=dtype), x.new_empty(rows, channels // size, dtype=torch.float32)


def _gradients(x: Tensor, z: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of x, z and weight."""
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, z, weight))  # type: ignore[return-value]
