"""A norm, a linear map and a residual on GPUs: one of two Triton kernels for up to ROWS rows, else torch's product."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plait.ops.gated_norm import gated_norm
from plait.ops.norm_linear.gpu_kernels import matrix_kernel, vector_kernel
from plait.ops.norm_linear.portable import norm_linear as portable
from plait.ops.triton_launch import Launch
from plait.ops.triton_steps import StepOp, columns
from plait.ops.triton_support import cdiv, multiprocessors, power_of_2, precision

ROWS = 128
"""Rows from which torch's matrix products are the better ones."""
VECTORS = 2
"""Rows up to which weights meet x in registers."""
TILE = 8192
"""Weights a program of `vector_kernel` holds, 64 of each of its 128 threads; more of both for wider inputs."""
WIDEST = (1 << 14, 1 << 13)
"""Channels of `vector_kernel` at most, for one row and for more: registers hold a thread's share of weights and x."""
GROUPS = 8
"""Groups that `vector_kernel` norms at most, one after the other."""


class Blocks(NamedTuple):
    """How the work is cut."""

    rows: int
    outputs: int
    channels: int
    warps: int
    stages: int


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x (R, D), weight (O, D) -> (R, O) in x's dtype."""
    if x.shape[0] > ROWS:
        if eps is not None:
            x = gated_norm(x, None, norm_weight, eps=eps, group_size=group_size)
        return portable(x, weight, bias, residual=residual)
    groups = 0 if eps is None else x.shape[1] // (group_size or x.shape[1])
    return MAP(x, weight, bias, norm_weight, residual, eps or 0.0, groups)


class Window(NamedTuple):
    """The convolution of outputs first .. first + C: its state (S, W-1, C), contiguous, taps (C, W) and bias (C)."""

    first: int
    state: Tensor
    taps: Tensor
    bias: Tensor | None


def _map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    groups: int,
) -> Tensor:
    """groups 0: no norm."""
    return launch(x, weight, bias, norm_weight, residual, eps, groups, None)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    groups: int,
    window: Window | None,
) -> Tensor:
    """Either kernel, on any number of rows."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    if y.numel() == 0:
        return y
    x, weight = columns(x), columns(weight)
    residual = None if residual is None else columns(residual)
    first, state, taps, conv_bias = window or (0, x, x, None)
    run = _launch(
        x.shape, weight.shape[0], x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        x.dtype, x.device,
        tuple(None if t is None else t.dtype for t in (bias, norm_weight, residual, conv_bias, state, taps)),
        eps, groups, None if window is None else (first, *taps.shape),
    )  # fmt: skip
    run(
        x, weight, *(x if t is None else t.contiguous() for t in (norm_weight, bias)),
        x if residual is None else residual, y, state, taps if window is None else taps.contiguous(),
        x if conv_bias is None else conv_bias.contiguous(),
    )  # fmt: skip
    return y


def _fake(x, weight, bias, norm_weight, residual, eps, groups):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


MAP = StepOp("norm_linear_gpu", _map, _fake)
"""The kernels as a custom op."""


def blocks(rows: int, channels: int, outputs: int, groups: int, programs: int, size: int) -> Blocks:
    """For x (rows, channels) of numbers of `size` bytes; `programs` or more of them fill the device."""
    if rows <= VECTORS and channels <= WIDEST[rows > 1] and groups <= GROUPS:
        width = power_of_2(channels, 32)
        # fewer where numbers are wider or met by more rows: their registers count too
        most = max(min(TILE * 2 // size, TILE) // (width * rows), 1)
        while most > 1 and cdiv(outputs, most) < programs:
            most //= 2
        return Blocks(rows, most, width, max(4, width // (1024 if rows > 1 else 2048)), 1)
    tall = min(power_of_2(rows, 16), 64)
    wide = 16 if tall == 64 and size == 4 else 64
    while wide > 16 and cdiv(outputs, wide) * cdiv(rows, tall) < programs // 2:
        wide //= 2
    # a thread's share of the products, of x and of what stands in for it have to fit its registers
    warps = 8 if tall == 64 else 4
    return Blocks(tall, wide, 256 // size, warps, 3 if tall * wide > 2048 else 4)


@lru_cache(maxsize=1024)
def _launch(
    shape: torch.Size,
    outputs: int,
    x_s: int,
    w_s: int,
    residual_s: int,
    dtype: torch.dtype,
    device: torch.device,
    others: tuple[torch.dtype | None, ...],
    eps: float,
    groups: int,
    window: tuple[int, int, int] | None,
) -> Launch:
    """`window`: the first output that is convolved, how many are, and taps."""
    rows, channels = shape
    b = blocks(rows, channels, outputs, groups, 2 * multiprocessors(device), dtype.itemsize)
    size = channels // max(groups, 1)
    first, conv_channels, width = window or (0, 0, 0)
    given = {
        "GROUPS": groups, "WEIGHT": others[1] is not None, "BIAS": others[0] is not None,
        "RESIDUAL": others[2] is not None, "WIDTH": width, "CONV_BIAS": others[3] is not None,
    }  # fmt: skip
    if b.stages == 1:
        numbers = (channels, outputs, x_s, w_s, residual_s, size, eps, first, conv_channels)
        return Launch(
            vector_kernel, cdiv(outputs, b.outputs), numbers, ROWS=rows, BO=b.outputs, BK=b.channels, **given,
            num_warps=b.warps,
        )  # fmt: skip
    across = cdiv(outputs, b.outputs)
    return Launch(
        matrix_kernel, across * cdiv(rows, b.rows),
        (rows, outputs, x_s, w_s, residual_s, size, eps, first, conv_channels, across), BR=b.rows, BO=b.outputs,
        BK=b.channels, **given, PRECISION=precision(torch.empty(0, dtype=dtype)), num_warps=b.warps,
        num_stages=b.stages,
    )  # fmt: skip
