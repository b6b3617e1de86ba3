"""Ternary weights and 8-bit activations in plain torch; kept for the backward is one bit mask at most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.chunks import compute_dtype, no_autocast

SMALLEST_SCALE = 1e-8
"""A part or row of zeros has a scale all the same."""


def ternary_weight(weight: Tensor, parts: tuple[int, ...] | None, *, clipped: bool) -> Tensor:
    """weight (O, I) -> the same; ``parts`` rows share a scale, None: each row has its own."""
    with no_autocast(weight):
        return _TernaryWeight.apply(weight, parts, clipped)


def int8_rows(x: Tensor) -> Tensor:
    """x (..., I) -> the same."""
    with no_autocast(x):
        return _Int8Rows.apply(x)


class _TernaryWeight(torch.autograd.Function):
    """weight (O, I), parts, clipped -> what the ternary weight stands for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: tuple[int, ...] | None, clipped: bool) -> Tensor:
        exact = weight.to(compute_dtype(weight))
        scale = _scales(exact, parts)
        ratio = exact / scale
        ctx.clipped = clipped
        if clipped:
            ctx.save_for_backward(ratio.abs() <= 1)
        return ratio.clamp_(-1, 1).round_().mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.clipped:
            return grads[0], None, None
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


class _Int8Rows(torch.autograd.Function):
    """x (..., I) -> what its 8-bit form stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        exact = x.to(compute_dtype(x))
        scale = (exact.abs().amax(-1, keepdim=True) / 127).clamp_(min=SMALLEST_SCALE)
        return (exact / scale).round_().clamp_(-127, 127).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        return (grads[0],)


def _scales(weight: Tensor, parts: tuple[int, ...] | None) -> Tensor:
    """The mean magnitude of each part or row, as (O, 1) or, for one part, (1, 1)."""
    size = weight.abs()
    if parts is None:
        means = size.mean(1, keepdim=True)
    elif len(parts) == 1:
        means = size.mean().view(1, 1)
    else:
        means = torch.cat([part.mean().expand(len(part), 1) for part in size.split(parts)])
    return means.clamp(min=SMALLEST_SCALE)
