"""One token of the causal depthwise convolution, tap by tap: the truth the other backends are judged by.

y[c] = act(bias[c] + sum_{j<W-1} weight[c, j] state[j, c] + weight[c, W-1] x[c]);  state <- state[1:], x
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """x (S, C), state (S, W-1, C), changed in place -> (S, C) in x's dtype."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.to(kind)
    y = taps[:, -1] * x.to(kind)
    for j in range(state.shape[1]):
        y = y + taps[:, j] * state[:, j].to(kind)
    if bias is not None:
        y = y + bias.to(kind)
    if activation == "silu":
        y = y / (1 + torch.exp(-y))
    for j in range(1, state.shape[1]):
        state[:, j - 1] = state[:, j]
    if state.shape[1]:
        state[:, -1] = x
    return y.to(x.dtype)
