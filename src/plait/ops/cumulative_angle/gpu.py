"""The running angle on GPUs: the Triton kernels of `gpu_kernels.py` as a torch op; two runs are equal bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.cumulative_angle import gpu_kernels
from plait.ops.triton_launch import Plans, Program
from plait.ops.triton_support import KernelOp, cdiv, power_of_2

CHUNKS, SHORTEST = 128, 64
"""Chunks of a row at most, because each begins by adding up those before it; tokens a chunk at least."""


def cumulative_angle(
    step: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None, max_len: int | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `plait.ops.cumulative_angle.cumulative_angle`; step may not be float64."""
    return ANGLE(step, initial_state, cu_seqlens)


def _forward(step: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """theta like step and the last angles (S, H, Ra), float32."""
    theta, final = _fake_forward(step, initial, cu_seqlens)
    if final.numel() == 0:
        return theta, final
    step = step.contiguous()
    initial = None if initial is None else initial.contiguous()

    def make() -> Program:
        program = Program(("step", "initial", "bounds", "theta", "final"))
        grid, numbers = _cut(step, final, cu_seqlens is not None)
        _totals(program, "step", grid, numbers, back=False)
        names = ("step", "initial", "bounds", "totals", "theta", "final")
        flags = {"INITIAL": initial is not None}
        program.add(gpu_kernels.forward_kernel, grid, names, numbers | flags, num_warps=1)
        return program

    key = ("forward", _kind(step), step.device, _kind(initial), _kind(cu_seqlens))
    plans.of(key, make)(step, initial, cu_seqlens, theta, final)
    return theta, final


def _fake_forward(step: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    n_seq = step.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        step.new_empty(step.shape, dtype=torch.float32),
        step.new_empty(n_seq, *step.shape[2:], dtype=torch.float32),
    )


def _backward(
    dtheta: Tensor, dfinal: Tensor | None, step: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of step and of the initial angles; the latter empty if those were not given."""
    dstep, dinitial = grads = _fake_backward(dtheta, dfinal, step, initial, cu_seqlens)
    like = _fake_forward(step, initial, cu_seqlens)[1]
    if like.numel() == 0:
        return grads
    dtheta = dtheta.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()

    def make() -> Program:
        program = Program(("dtheta", "dfinal", "bounds", "dstep", "dinitial"))
        grid, numbers = _cut(dtheta, like, cu_seqlens is not None)
        _totals(program, "dtheta", grid, numbers, back=True)
        names = ("dtheta", "dfinal", "bounds", "totals", "dstep", "dinitial")
        flags = {"FINAL": dfinal is not None, "INITIAL": initial is not None}
        program.add(gpu_kernels.backward_kernel, grid, names, numbers | flags, num_warps=1)
        return program

    key = (
        "backward",
        _kind(dtheta),
        step.device,
        step.dtype,
        _kind(dfinal),
        _kind(initial),
        _kind(cu_seqlens),
    )
    plans.of(key, make)(dtheta, dfinal, cu_seqlens, dstep, dinitial)
    return grads


def _fake_backward(
    dtheta: Tensor, dfinal: Tensor | None, step: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    none = step.new_empty(0)
    return step.new_empty(step.shape), none if initial is None else initial.new_empty(initial.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, backward: Any, dtheta: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    step, initial, cu_seqlens = ctx.saved_tensors
    if dtheta is None:
        dtheta = step.new_zeros(step.shape, dtype=torch.float32)
    dstep, dinitial = backward(dtheta, dfinal, step, initial, cu_seqlens)
    return dstep, None if initial is None else dinitial, None


ANGLE = KernelOp(
    "cumulative_angle_gpu",
    _forward,
    _backward,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
"""The angle with its gradient."""
plans: Plans[Program] = Plans()
"""Of the kinds of calls so far."""


def _cut(tokens: Tensor, final: Tensor, varlen: bool) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid and the numbers of the kernels: tokens (rows, T, H, Ra) in chunks, angles in blocks of 32 or 64."""
    rows, length = tokens.shape[:2]
    channels = tokens.shape[2:].numel()
    width = 32 if channels <= 32 else 64
    chunk_tokens = max(power_of_2(cdiv(length, CHUNKS)), SHORTEST)
    chunks, blocks = max(cdiv(length, chunk_tokens), 1), cdiv(channels, width)
    numbers = {
        "channels": channels, "length": length, "sequences": final.shape[0], "chunks": chunks, "blocks": blocks,
        "chunk_tokens": chunk_tokens, "CHANNELS": width, "VARLEN": varlen,
    }  # fmt: skip
    return (rows * chunks * blocks, 1, 1), numbers


def _totals(
    program: Program, name: str, grid: tuple[int, int, int], numbers: dict[str, Any], *, back: bool
) -> None:
    """Append the sums of the chunks, unless there is but one in a row."""
    count = grid[0] // numbers["blocks"] if numbers["chunks"] > 1 else 0
    program.memory("totals", count, numbers["channels"], dtype=torch.float64)
    if count:
        names = (name, "totals", "bounds")
        program.add(gpu_kernels.totals_kernel, grid, names, numbers | {"BACK": back}, num_warps=1)


def _kind(t: Tensor | None) -> Any:
    """What a program knows of a tensor without gaps."""
    return None if t is None else (t.dtype, t.shape)
