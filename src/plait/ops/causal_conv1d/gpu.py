"""The causal depthwise convolution on GPUs: the Triton kernels of gpu_kernels.py as torch custom ops.

It likes channels side by side, as projections give them; x or gradients in another order are copied. Only the inputs
are kept for the backward. Two runs are equal bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.causal_conv1d.gpu_kernels import TILE, backward_kernel, forward_kernel
from plait.ops.triton_launch import Launch
from plait.ops.triton_sums import sum_parts
from plait.ops.triton_support import KernelOp, cdiv, power_of_2

PROGRAMS = 2048
"""Programs that fill a GPU; chunks are cut shorter to have as many."""


class Config(NamedTuple):
    """What a kernel of one warp a program does: bytes a lane loads at once, tokens a chunk at most, registers."""

    bytes: int
    longest: int
    registers: int | None = None


FORWARD = Config(8, 64)
BACKWARD = Config(4, 256)


class Call(NamedTuple):
    """All that depends on the shapes alone."""

    launch: Launch
    chunks: int
    add: Launch | None = None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x (S, T, C), weight (C, W), bias (C) -> y (S, T, C), the last W-1 inputs (S, W-1, C) in x's dtype.

    Packed: one row (1, n, C) with cu_seqlens (S+1,); max_len is not needed here.
    """
    return CONVOLUTION(x, weight, bias, initial_state, cu_seqlens, activation == "silu")


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    y, final = _fake_forward(x, weight, bias, initial, cu_seqlens, silu)
    if x.shape[2] == 0 or final.shape[0] == 0:
        return y, final
    x = _rows(x)
    call = _forward_call(
        x.shape, x.stride(), x.dtype, x.device, weight.stride(), weight.dtype, final.shape[:2], silu,
        None if bias is None else bias.dtype, None if initial is None else initial.dtype,
        None if cu_seqlens is None else cu_seqlens.dtype,
    )  # fmt: skip
    call.launch(
        x, weight, x if bias is None else bias, x if initial is None else initial.contiguous(), y, final,
        x if cu_seqlens is None else cu_seqlens,
    )  # fmt: skip
    return y, final


def _fake_forward(x, weight, bias, initial, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(n_seq, weight.shape[1] - 1, x.shape[2])


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state; empty for what was not given."""
    dx, dweight, dbias, dinitial = grads = _fake_backward(
        dy, dfinal, x, weight, bias, initial, cu_seqlens, silu
    )
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.shape[2] == 0 or n_seq == 0:
        for grad in grads:
            grad.zero_()
        return grads
    x, dy = _rows(x), _rows(dy)
    call = _backward_call(
        x.shape, x.stride(), x.dtype, x.device, weight.stride(), weight.dtype, (n_seq, weight.shape[1] - 1), silu,
        None if bias is None else bias.dtype, None if initial is None else initial.dtype,
        None if cu_seqlens is None else cu_seqlens.dtype, dy.stride(), dfinal is not None,
    )  # fmt: skip
    parts = x.new_empty(call.chunks, weight.shape[1] + 1, x.shape[2], dtype=torch.float32)
    call.launch(
        dy, x if dfinal is None else dfinal.contiguous(), x, weight, x if bias is None else bias,
        x if initial is None else initial.contiguous(), dx, dinitial, parts, x if cu_seqlens is None else cu_seqlens,
    )  # fmt: skip
    assert call.add is not None
    call.add(parts, dweight, parts if bias is None else dbias)
    return grads


def _fake_backward(dy, dfinal, x, weight, bias, initial, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    none = x.new_empty(0)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        none if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial is None else initial.new_empty(initial.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, initial, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dinitial = backward(dy, dfinal, x, weight, bias, initial, cu_seqlens, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if initial is None else dinitial, None, None


CONVOLUTION = KernelOp(
    "causal_conv1d_gpu",
    _forward,
    _backward,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
"""The convolution with its gradient."""


class Plan(NamedTuple):
    """How the work is cut."""

    tokens: int
    """of a chunk"""
    chunks: int
    """of a row"""
    channels: int
    """of a block"""
    blocks: int


def plan(shape: torch.Size, size: int, width: int, config: Config) -> Plan:
    """Cut x (S, T, C) of `size` bytes a number for a kernel of `width` taps."""
    rows, length, channels = shape
    lanes = max(config.bytes // size, 1)
    # narrow inputs spread over more programs; many taps leave registers for few channels
    while lanes > 1 and (32 * lanes >= 2 * channels or lanes * width > 32):
        lanes //= 2
    blocks = cdiv(channels, 32 * lanes)
    tokens = min(power_of_2(cdiv(length * rows * blocks, PROGRAMS), TILE.value), config.longest)
    return Plan(tokens, max(cdiv(length, tokens), 1), 32 * lanes, blocks)


@lru_cache(maxsize=1024)
def _forward_call(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    taps: tuple[int, ...],
    weight: torch.dtype,
    final: tuple[int, int],
    silu: bool,
    bias: torch.dtype | None,
    initial: torch.dtype | None,
    bounds: torch.dtype | None,
) -> Call:
    p = plan(shape, dtype.itemsize, final[1] + 1, FORWARD)
    numbers = (*stride[:2], *taps, shape[2], shape[1], final[0], p.chunks, p.blocks, p.tokens)
    launch = Launch(
        forward_kernel, shape[0] * p.chunks * p.blocks, numbers, WIDTH=final[1] + 1, CHANNELS=p.channels, SILU=silu,
        BIAS=bias is not None, INITIAL=initial is not None, VARLEN=bounds is not None, num_warps=1,
        maxnreg=FORWARD.registers,
    )  # fmt: skip
    return Call(launch, shape[0] * p.chunks)


@lru_cache(maxsize=1024)
def _backward_call(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    taps: tuple[int, ...],
    weight: torch.dtype,
    final: tuple[int, int],
    silu: bool,
    bias: torch.dtype | None,
    initial: torch.dtype | None,
    bounds: torch.dtype | None,
    dy_stride: tuple[int, ...],
    dfinal: bool,
) -> Call:
    width = final[1] + 1
    p = plan(shape, dtype.itemsize, width, BACKWARD)
    numbers = (*dy_stride[:2], *stride[:2], *taps, shape[2], shape[1], final[0], p.chunks, p.blocks, p.tokens)
    launch = Launch(
        backward_kernel, shape[0] * p.chunks * p.blocks, numbers, WIDTH=width, CHANNELS=p.channels, SILU=silu,
        BIAS=bias is not None, INITIAL=initial is not None, FINAL=dfinal, VARLEN=bounds is not None, num_warps=1,
        maxnreg=BACKWARD.registers,
    )  # fmt: skip
    chunks = shape[0] * p.chunks
    add = sum_parts(chunks, (width + 1) * shape[2], width, shape[2], vector=bias is not None)
    return Call(launch, chunks, add)


def _rows(x: Tensor) -> Tensor:
    """x (S, T, C), copied if its channels do not lie side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
