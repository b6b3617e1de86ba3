"""The pointwise half of a block: two linear maps around an activation, or a gated one (SwiGLU)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.config.schema import MLPConfig
from plait.nn.joined import joins, project
from plait.nn.linear import LinearSpec, make_linear


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (GPT-2's)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu2": relu2}
_SWIGLU_MULTIPLE = 64


def mlp_width(config: MLPConfig, d_model: int) -> int:
    """The hidden width: as configured, else 4 d_model, or 8/3 d_model rounded up to 64 for SwiGLU."""
    if config.width is not None:
        return config.width
    if config.kind == "swiglu":
        return -(-8 * d_model // (3 * _SWIGLU_MULTIPLE)) * _SWIGLU_MULTIPLE
    return 4 * d_model


class MLP(nn.Module):
    """(..., d_model) -> (..., d_model): fc2(act(fc1 x)), or fc2(u * silu(g)) with [u, g] = fc1 x for SwiGLU."""

    def __init__(self, config: MLPConfig, d_model: int, *, linear: LinearSpec = "dense") -> None:
        super().__init__()
        self.kind = config.kind
        width = mlp_width(config, d_model)
        if config.linear is not None:
            linear = config.linear
        parts = [width, width] if config.kind == "swiglu" else [width]
        self.fc1 = make_linear(d_model, sum(parts), bias=config.bias, kind=linear, parts=parts)
        self.fc2 = make_linear(width, d_model, bias=config.bias, kind=linear)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_model)."""
        return self.fc2(self._activated(self.fc1(x)))

    @torch.no_grad()
    def step_residual(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x + self(norm(x)) without a gradient; for one token a sequence, x (S, 1, d_model), in joined kernels."""
        if x.shape[1] != 1 or not joins(x, norm, self.fc1, self.fc2):
            return x + self(norm(x))
        rows = x[:, 0]
        return project(self._activated(project(rows, self.fc1, norm)), self.fc2, residual=rows)[:, None]

    def _activated(self, hidden: Tensor) -> Tensor:
        if self.kind == "swiglu":
            value, gate = hidden.chunk(2, dim=-1)
            return value * F.silu(gate)
        return ACTIVATIONS[self.kind](hidden)

    def residual_weights(self) -> list[Tensor]:
        """The weights that write into the residual stream; depth-scaled at initialisation."""
        return [self.fc2.weight]

    def flops(self, n_tokens: int) -> int:
        """Multiply-adds of the matrix products, counted as two operations each."""
        return 2 * n_tokens * sum(p.numel() for p in self.parameters() if p.dim() == 2)
