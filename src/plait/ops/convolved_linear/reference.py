"""RMS norm, linear map and the convolution of some outputs, spelled out: the truth the other backends are judged by.

y = W (x / sqrt(mean(x^2) + eps) * norm_weight) + bias;  for columns c of the convolution, in their place,
silu(conv_bias[c] + sum_{j<W-1} conv_weight[c, j] state[j, c] + conv_weight[c, W-1] y[c]);  state <- state[1:], y
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def convolved_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    group_size: int | None = None,
) -> Tensor:
    """x (R, D), weight (O, D) -> (R, O) in x's dtype; the state is changed in place."""
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        u = x.to(kind)
        if eps is not None:
            size = group_size or u.shape[1]
            parts = u.split(size, 1) if size else ()
            u = torch.cat([p / torch.sqrt((p * p).mean(1, keepdim=True) + eps) for p in parts], 1)
        if norm_weight is not None:
            u = u * norm_weight.to(kind)
        y = (weight.to(kind)[None] * u[:, None]).sum(2)
        if bias is not None:
            y = y + bias.to(kind)
        y = y.to(x.dtype)  # what the convolution is given and remembers
        columns, taps = slice(first, first + conv_weight.shape[0]), conv_weight.to(kind)
        new = y[:, columns].clone()
        total = taps[:, -1] * new.to(kind)
        for j in range(state.shape[1]):
            total = total + taps[:, j] * state[:, j].to(kind)
        if conv_bias is not None:
            total = total + conv_bias.to(kind)
        y[:, columns] = (total / (1 + torch.exp(-total))).to(x.dtype)
        for j in range(1, state.shape[1]):
            state[:, j - 1] = state[:, j]
        if state.shape[1]:
            state[:, -1] = new
        return y
