"""One token of the causal depthwise convolution in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.chunks import compute_dtype, no_autocast


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """x (S, C), state (S, W-1, C), changed in place -> (S, C) in x's dtype."""
    with no_autocast(x):
        return convolve(x, state, weight, bias, activation).to(x.dtype)


def convolve(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The same in float32 (float64 for float64 x), outside of autocast."""
    kind = compute_dtype(x)
    window = torch.cat([state.to(kind), x.to(kind)[:, None]], 1)
    y = (window * weight.to(kind).t()).sum(1)
    if bias is not None:
        y = y + bias.to(kind)
    # as given, not as computed with: a state may be wider than x
    state.copy_(torch.cat([state[:, 1:], x[:, None].to(state.dtype)], 1)[:, : state.shape[1]])
    return functional.silu(y) if activation == "silu" else y
