"""The running angle on CPUs: the Numba kernels of `cpu_kernels.py` as torch custom ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.ops.cumulative_angle import cpu_kernels
from plait.ops.numba_run import direct, flat, numbers, run
from plait.ops.segments import count_sequences, segments


def cumulative_angle(
    step: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None, max_len: int | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `plait.ops.cumulative_angle.cumulative_angle`; step may not be float64."""
    return direct(_forward, _compute, step, initial_state, cu_seqlens)


def _compute(step: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """theta like step and the last angles (S, H, Ra), float32."""
    n_seq = count_sequences(step, cu_seqlens)
    theta = step.new_empty(step.shape, dtype=torch.float32)
    final = step.new_empty(n_seq, *step.shape[2:], dtype=torch.float32)
    _call(cpu_kernels.forward, step, cu_seqlens, numbers(step), numbers(initial), flat(theta), flat(final))
    return theta, final


_forward = torch.library.custom_op(
    "plait::cumulative_angle_cpu", _compute, mutates_args=(), device_types="cpu"
)


@_forward.register_fake
def _(step: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        step.new_empty(step.shape, dtype=torch.float32),
        step.new_empty(count_sequences(step, cu_seqlens), *step.shape[2:], dtype=torch.float32),
    )


@torch.library.custom_op("plait::cumulative_angle_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(dtheta: Tensor, dfinal: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of step and of the initial angles, float32."""
    dstep = dtheta.new_empty(dtheta.shape, dtype=torch.float32)
    dinitial = dtheta.new_empty(count_sequences(dtheta, cu_seqlens), *dtheta.shape[2:], dtype=torch.float32)
    arrays = numbers(dtheta), numbers(dfinal), flat(dstep), flat(dinitial)
    _call(cpu_kernels.backward, dtheta, cu_seqlens, *arrays)
    return dstep, dinitial


@_backward.register_fake
def _(dtheta: Tensor, dfinal: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        dtheta.new_empty(dtheta.shape, dtype=torch.float32),
        dtheta.new_empty(count_sequences(dtheta, cu_seqlens), *dtheta.shape[2:], dtype=torch.float32),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    step, initial, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens)
    ctx.like = step.shape, step.dtype, None if initial is None else initial.dtype


def _gradients(ctx: Any, dtheta: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    shape, dtype, initial = ctx.like
    if dtheta is None:
        if dfinal is None:
            return None, None, None
        dtheta = dfinal.new_zeros(shape)
    dstep, dinitial = _backward(dtheta, dfinal, *ctx.saved_tensors)
    return dstep.to(dtype), None if initial is None else dinitial.to(initial), None


_forward.register_autograd(_gradients, setup_context=_remember)


def _call(kernel: Any, like: Tensor, cu_seqlens: Tensor | None, *arrays: np.ndarray) -> None:
    """Run a kernel over the sequences and columns of angles of a tensor (S, T, H, Ra)."""
    n_seq, length, angles = count_sequences(like, cu_seqlens), like.shape[1], like.shape[2:].numel()
    columns = -(-angles // cpu_kernels.WIDTH)
    table, _ = segments(n_seq, length, cu_seqlens, max(length, 1))
    run(kernel, n_seq * columns, like.numel(), (length, angles, columns), table, *arrays)
