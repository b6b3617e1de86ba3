"""A linear map of a few rows on CPUs, with the norm before and the residual after it: one Numba kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.norm_linear import portable
from plait.ops.norm_linear.cpu_kernels import PRODUCT
from plait.ops.numba_team import address, bits, call

_FULL, _LEAST = 32, 16
"""Outputs a task: many, so that memory is read in long runs, but fewer where there would be too few tasks"""
_TASKS = 12
_MOST = 8
"""Rows: for more, torch's product, which keeps weights in the caches, is the faster"""
KNOWN = (torch.float32, torch.bfloat16)


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
    """x (R, D), weight (O, D) -> (R, O) in x's dtype, float32 or bfloat16; sums are float32.

    Many rows take torch's product, as do traces of torch.compile: `portable`'s operations.
    """
    (rows, channels), outputs = x.shape, weight.shape[0]
    if rows > _MOST or torch.compiler.is_compiling():
        return portable.norm_linear(
            x, weight, bias, norm_weight=norm_weight, eps=eps, group_size=group_size, residual=residual
        )
    x, weight, residual = together(x), together(weight), None if residual is None else together(residual)
    bias = None if bias is None else known(bias)
    scale = None if norm_weight is None else single(norm_weight)
    y = x.new_empty(rows, outputs)
    share = _FULL if outputs >= _TASKS * _FULL else _LEAST
    call(
        PRODUCT,
        -(-outputs // share) if rows else 0,
        rows,
        channels,
        outputs,
        share,
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        x.stride(0),
        0 if eps is None else group_size or channels,
        0 if eps is None else bits(eps),
        address(scale),
        weight.data_ptr(),
        weight.dtype is torch.bfloat16,
        weight.stride(0),
        address(bias),
        bias is not None and bias.dtype is torch.bfloat16,
        address(residual),
        residual is not None and residual.dtype is torch.bfloat16,
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
        y.dtype is torch.bfloat16,
        keep=(x, weight, bias, scale, residual, y),
    )
    return y


def known(x: Tensor) -> Tensor:
    """x as kernels read it: float32 or bfloat16, in order and without gaps."""
    return (x if x.dtype in KNOWN else x.float()).contiguous()


def single(x: Tensor) -> Tensor:
    """x in float32, in order and without gaps."""
    return x.float().contiguous()


def together(x: Tensor) -> Tensor:
    """x (R, E) as kernels read it: float32 or bfloat16, the channels side by side, the rows anywhere."""
    x = x if x.dtype in KNOWN else x.float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
