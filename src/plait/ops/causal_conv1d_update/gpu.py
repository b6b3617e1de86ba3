"""One token of the causal depthwise convolution in Triton: read a window, write y and the window moved on.

A number of the state is read and written by one program alone, which waits for all its reads before it writes.
"""

# Triton's functions take and return what mypy has no types for, and it knows no (*a, b).
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.selective_scan.gpu_tiles import sigmoid
from plait.ops.triton_launch import Launch
from plait.ops.triton_steps import StepOp, columns
from plait.ops.triton_support import cdiv

BLOCK = 128
"""Channels a program."""


@triton.jit
def update_kernel(
    x_p, state_p, w_p, bias_p, y_p, x_s, channels, blocks, WIDTH: tl.constexpr, SILU: tl.constexpr,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of channels of one sequence; state (S, WIDTH-1, C) and w (C, WIDTH) are contiguous."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = c < channels
    x = tl.load(x_p + row * x_s + c, mask=live, other=0.0)
    own = state_p + row * (WIDTH - 1) * channels + c
    window = ()
    for j in tl.static_range(WIDTH - 1):
        window = window + (tl.load(own + j * channels, mask=live, other=0.0),)
    y = x.to(tl.float32) * tl.load(w_p + c * WIDTH + WIDTH - 1, mask=live, other=0.0).to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        y += window[j].to(tl.float32) * tl.load(w_p + c * WIDTH + j, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_p + c, mask=live, other=0.0).to(tl.float32)
    if SILU:
        y *= sigmoid(y)
    tl.debug_barrier()  # several threads may have read a number that one of them now writes
    for j in tl.static_range(1, WIDTH - 1):
        tl.store(own + (j - 1) * channels, window[j], mask=live)
    if WIDTH > 1:
        tl.store(own + (WIDTH - 2) * channels, x.to(state_p.dtype.element_ty), mask=live)
    tl.store(y_p + row * channels + c, y.to(y_p.dtype.element_ty), mask=live)


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """x (S, C), state (S, W-1, C), changed in place -> (S, C) in x's dtype."""
    return UPDATE(x, state, weight, bias, activation == "silu")


def _update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    x = columns(x)
    launch = _launch(
        x.shape, x.stride(0), weight.shape[1], silu, x.device,
        tuple(None if t is None else t.dtype for t in (x, state, weight, bias)),
    )  # fmt: skip
    launch(x, state, weight.contiguous(), x if bias is None else bias.contiguous(), y)
    return y


def _fake(x, state, weight, bias, silu):
    return x.new_empty(x.shape)


UPDATE = StepOp("causal_conv1d_update_gpu", _update, _fake, ("state",))
"""The kernel as a custom op."""


@lru_cache(maxsize=1024)
def _launch(
    shape: torch.Size,
    x_s: int,
    width: int,
    silu: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
) -> Launch:
    blocks = cdiv(shape[1], BLOCK)
    return Launch(
        update_kernel, shape[0] * blocks, (x_s, shape[1], blocks), WIDTH=width, SILU=silu, BIAS=dtypes[3] is not None,
        BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip
