"""Backout: before the final norm, a learned share of what the middle layer gave is taken away again.

The features of the lower half help to build those of the upper half, but not to tell the next token.
Source: nanochat of July 2026 (github.com/karpathy/nanochat).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.nn.roles import VECTOR_FP32, Role


class Backout(nn.Module):
    """x - share * middle; ``after`` is the index of the layer whose output is the middle."""

    roles: ClassVar[dict[str, Role]] = {"share": VECTOR_FP32}

    def __init__(self, n_layer: int) -> None:
        super().__init__()
        self.after = n_layer // 2
        self.share = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with a fifth."""
        nn.init.constant_(self.share, 0.2)

    def forward(self, x: Tensor, middle: Tensor) -> Tensor:
        """x and middle: (..., d)."""
        return x - self.share.to(x.dtype) * middle
