"""A residual sum and its RMS norm, spelled out: the truth the other backends are judged by."""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """s = x + y;  s / sqrt(mean(s^2) + eps) * weight  in ``dtype``, and s."""
    with torch.autocast(x.device.type, enabled=False):
        s = x + y
        u = s.to(torch.float64 if s.dtype == torch.float64 else torch.float32)
        normed = u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)
        if weight is not None:
            normed = normed * weight.to(u.dtype)
        return normed.to(dtype), s
