"""The causal depthwise convolution on GPUs: the Triton kernels of gpu_kernels.py as torch custom ops.

It likes channels contiguous, as projections give them, and takes time contiguous, x of memory (S, C, T), as fast;
y and dx come in x's order. Only the inputs are kept for the backward. Two runs are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.ops.causal_conv1d.gpu_kernels import TILE, backward_kernel, forward_kernel
from plait.ops.triton_sums import sum_parts
from plait.ops.triton_support import KernelOp, cdiv, on_device, power_of_2

PROGRAMS = 2048
"""Warps that fill a GPU; chunks are cut shorter to have as many."""
FORWARD = {"bytes": 16, "warps": 1, "longest": 64}
"""Of the forward: what a lane loads at once if channels lie side by side; warps a program; tokens a chunk at most."""
BACKWARD = {"bytes": 8, "warps": 1, "longest": 128}
TIME_FORWARD = {"bytes": 0, "warps": 1, "longest": 128}
"""Where tokens lie side by side: one channel a lane."""
TIME_BACKWARD = {"bytes": 0, "warps": 1, "longest": 256}
MOST_TAPS = 9
"""Taps up to which a tile holds the tokens that its neighbour needs."""


@dataclass(frozen=True)
class Plan:
    """How the work is cut."""

    rows: int
    chunks: int
    """of a row"""
    tokens: int
    """of a chunk"""
    blocks: int
    """of channels"""
    channels: int
    """of a block"""
    warps: int

    @property
    def programs(self) -> int:
        """Programs in all."""
        return self.rows * self.chunks * self.blocks


def plan(x: Tensor, width: int, table: dict[str, int]) -> Plan:
    """Cut x (S, T, C) for a kernel of `width` taps."""
    rows, length, channels = x.shape
    warps, lanes = table["warps"], max(table["bytes"] // x.element_size(), 1)
    # narrow inputs spread over more programs; many taps leave registers for few channels
    while lanes > 1 and (32 * lanes * warps >= 2 * channels or lanes * width > 32):
        lanes //= 2
    while warps > 1 and 32 * lanes * warps >= 2 * channels:
        warps //= 2
    per_block = 32 * lanes * warps
    blocks = cdiv(channels, per_block)
    wanted = cdiv(length * rows * blocks * warps, PROGRAMS)
    tokens = min(power_of_2(wanted, TILE.value), table["longest"])
    return Plan(rows, max(cdiv(length, tokens), 1), tokens, blocks, per_block, warps)


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
    width, time = weight.shape[1], _time_order(x)
    p = plan(x, width, TIME_FORWARD if time else FORWARD)
    state = x if initial is None else initial.contiguous()
    with on_device(x):
        forward_kernel[(p.programs,)](
            x, weight, x if bias is None else bias, state, y, final, x if cu_seqlens is None else cu_seqlens,
            *x.stride(), *y.stride(), *weight.stride(), x.shape[2], x.shape[1], final.shape[0], p.chunks, p.blocks,
            p.tokens, WIDTH=width, CHANNELS=p.channels, SILU=silu, BIAS=bias is not None,
            INITIAL=initial is not None, VARLEN=cu_seqlens is not None, TX=time and width <= MOST_TAPS, TY=time,
            num_warps=p.warps,
        )  # fmt: skip
    return y, final


def _fake_forward(x, weight, bias, initial, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _like(x), x.new_empty(n_seq, weight.shape[1] - 1, x.shape[2])


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
    width, time = weight.shape[1], _time_order(x)
    near = width <= MOST_TAPS
    p = plan(x, width, TIME_BACKWARD if time else BACKWARD)
    state = x if initial is None else initial.contiguous()
    dlast = x if dfinal is None else dfinal.contiguous()
    parts = x.new_empty(p.rows * p.chunks, (width + 1) * x.shape[2], dtype=torch.float32)
    with on_device(x):
        backward_kernel[(p.programs,)](
            dy, dlast, x, weight, x if bias is None else bias, state, dx, dinitial, parts,
            x if cu_seqlens is None else cu_seqlens, *dy.stride(), *x.stride(), *dx.stride(), *weight.stride(),
            x.shape[2], x.shape[1], n_seq, p.chunks, p.blocks, p.tokens, WIDTH=width, CHANNELS=p.channels, SILU=silu,
            BIAS=bias is not None, INITIAL=initial is not None, FINAL=dfinal is not None,
            VARLEN=cu_seqlens is not None, TX=time and near, TDY=_time_order(dy) and near, TDX=time,
            num_warps=p.warps,
        )  # fmt: skip
    sum_parts(parts, dweight, dbias if bias is not None else parts.new_empty(x.shape[2]))
    return grads


def _fake_backward(dy, dfinal, x, weight, bias, initial, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    return (
        _like(x),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
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


def _time_order(x: Tensor) -> bool:
    """Whether x (S, T, C) has tokens side by side, and not channels."""
    return x.stride(1) == 1 and x.stride(2) != 1


def _like(x: Tensor) -> Tensor:
    """A new tensor (S, T, C) in x's order: time contiguous or channels contiguous."""
    rows, length, channels = x.shape
    if _time_order(x):
        return x.new_empty(rows, channels, length).transpose(1, 2)
    return x.new_empty(rows, length, channels)
