"""RMS norm, linear map and residual, spelled out: the truth the other backends are judged by.

y = residual + W (x / sqrt(mean(x^2) + eps) * norm_weight) + bias, the mean over each group of channels
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
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
    """x (R, D), weight (O, D) -> (R, O) in x's dtype; every row on its own."""
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = torch.empty(x.shape[0], weight.shape[0], dtype=kind, device=x.device)
        for row, given in enumerate(x.to(kind)):
            u = given
            if eps is not None:
                size = group_size or u.shape[0]
                u = torch.cat([part / torch.sqrt((part * part).mean() + eps) for part in u.split(size)])
            if norm_weight is not None:
                u = u * norm_weight.to(kind)
            y[row] = (weight.to(kind) * u).sum(1)
        if bias is not None:
            y = y + bias.to(kind)
        if residual is not None:
            y = y + residual.to(kind)
        return y.to(x.dtype)
