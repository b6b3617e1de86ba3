"""A residual sum and its RMS norm in plain torch: an addition, and the norm of `gated_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.gated_norm.portable import gated_norm


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, y (..., E), weight (E) -> the norm in ``dtype`` and the sum, both (..., E)."""
    s = x + y
    return gated_norm(s, None, weight, eps=eps, dtype=dtype), s
