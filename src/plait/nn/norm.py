"""Normalisation layers: RMSNorm and LayerNorm with or without weights, and the gated RMSNorm of Mamba-2 and -3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.config.schema import NormConfig
from plait.nn.roles import VECTOR_FP32
from plait.ops.gated_norm import gated_norm


def make_norm(config: NormConfig, dim: int) -> nn.Module:
    """The norm over the last ``dim`` channels that ``config`` describes; the identity for kind "none"."""
    if config.kind == "none":
        return nn.Identity()
    if config.kind == "rms":
        if config.bias:
            raise ValueError("norm: an rms norm has no bias; use kind layer")
        return nn.RMSNorm(dim, eps=config.eps, elementwise_affine=config.weight)
    bias = config.weight if config.bias is None else config.bias
    return nn.LayerNorm(dim, eps=config.eps, elementwise_affine=config.weight, bias=bias)


class GatedRMSNorm(nn.Module):
    """RMS norm of (..., E) gated by silu(z), statistics over groups of channels (Mamba-2, arXiv 2405.21060)."""

    roles = {"weight": VECTOR_FP32}  # noqa: RUF012

    def __init__(
        self, dim: int, *, group_size: int | None = None, norm_before_gate: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.group_size = group_size or dim
        self.norm_before_gate = norm_before_gate
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., E) -> (..., E); ``z`` None leaves the gate out."""
        return gated_norm(
            x,
            z,
            self.weight,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )
