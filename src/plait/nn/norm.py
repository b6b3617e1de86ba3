"""Normalisation layers: RMSNorm, with the gate of Mamba-2 and -3 as an option, and torch's LayerNorm."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.config.schema import NormConfig
from plait.nn.roles import VECTOR_FP32, Role
from plait.ops.add_norm import add_norm
from plait.ops.chunks import autocast_dtype
from plait.ops.gated_norm import gated_norm


def make_norm(config: NormConfig, dim: int) -> nn.Module:
    """The norm over the last ``dim`` channels that ``config`` describes; the identity for kind "none"."""
    if config.kind == "none":
        return nn.Identity()
    if config.kind == "rms":
        if config.bias:
            raise ValueError("norm: an rms norm has no bias; use kind layer")
        return RMSNorm(dim, eps=config.eps, weight=config.weight)
    bias = config.weight if config.bias is None else config.bias
    return nn.LayerNorm(dim, eps=config.eps, elementwise_affine=config.weight, bias=bias)


def norm_for_products(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) for a branch that begins with matrix products: under autocast in the dtype in which it takes them."""
    return norm(x, dtype=autocast_dtype(x)) if type(norm) is RMSNorm else norm(x)


def add_and_norm(x: Tensor, y: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``norm_for_products`` of x + y, and x + y; in one pass over the memory where the norm is an RMS norm."""
    if type(norm) is RMSNorm and norm.group_size == x.shape[-1]:
        kind = autocast_dtype(x)
        return add_norm(x, y, norm.weight, eps=norm.eps, dtype=None if kind == x.dtype else kind)
    x = x + y
    return norm_for_products(norm, x), x


class RMSNorm(nn.Module):
    """RMS norm of (..., E), statistics in float32 over groups of channels, with an optional gate silu(z).

    Without a gate it is the norm of arXiv 1910.07467; with one, that of Mamba-2 (arXiv 2405.21060, section 7).
    """

    roles: ClassVar[dict[str, Role]] = {"weight": VECTOR_FP32}

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        weight: bool = True,
        group_size: int | None = None,
        norm_before_gate: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim)) if weight else None
        self.eps = eps
        self.group_size = group_size or dim
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every weight to one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """x, z: (..., E) -> (..., E) in ``dtype`` (None: x's); ``z`` None leaves the gate out."""
        return gated_norm(
            x,
            z,
            self.weight,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
            dtype=dtype,
        )
