"""MiniMamba's norm."""

from __future__ import annotations

from plait.nn.norm import RMSNorm as PlaitRMSNorm


class RMSNorm(PlaitRMSNorm):
    """Plait's RMS norm of (..., d_model) with learned scales."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__(d_model, eps=eps)
