"""A norm, a linear map and a residual as one op, for the few rows of a decoding step.

Only what is known to compute just this is joined: plain layers of exactly these types, with nothing hooked on them, in
the dtype of x, outside of autocast. Everything else (ternary maps, adapters, sharded weights) goes its own way.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plait.nn.norm import RMSNorm
from plait.ops.chunks import autocast_dtype
from plait.ops.convolved_linear import convolved_linear
from plait.ops.norm_linear import norm_linear


class LinearMap(Protocol):
    """What has the weights of a linear map."""

    @property
    def weight(self) -> Tensor: ...  # noqa: D102
    @property
    def bias(self) -> Tensor | None: ...  # noqa: D102


def joins(x: Tensor, norm: nn.Module | None, *maps: nn.Linear) -> bool:
    """Whether ``project`` of x (..., D) by each of these maps, the norm before one of them, is what they compute."""
    return (
        not torch.compiler.is_compiling()
        and autocast_dtype(x) == x.dtype
        and (norm is None or plain(norm, nn.Identity) or plain(norm, RMSNorm))
        and all(plain(m, nn.Linear) and m.weight.dtype == x.dtype for m in maps)
    )


def project(
    x: Tensor, linear: LinearMap, norm: nn.Module | None = None, residual: Tensor | None = None
) -> Tensor:
    """residual + linear(norm(x)) for x (R, D) and residual (R, O), without a gradient; a new (R, O)."""
    return norm_linear(x, linear.weight, linear.bias, residual=residual, **_options(norm, x))


def convolves(x: Tensor) -> bool:
    """Whether ``project_convolved`` is one kernel where x is; where it is not, others convolve at less cost."""
    return x.is_cuda


def project_convolved(
    x: Tensor, linear: LinearMap, norm: nn.Module | None, first: int, state: Tensor, conv: nn.Conv1d
) -> Tensor:
    """linear(norm(x)) for x (R, D), its columns from ``first`` on through ``conv`` and silu; a new (R, O).

    state (R, W-1, C), the last inputs of the convolution, is changed in place.
    """
    taps = conv.weight.squeeze(1)
    return convolved_linear(x, linear.weight, linear.bias, first, state, taps, conv.bias, **_options(norm, x))


def _options(norm: nn.Module | None, x: Tensor) -> dict[str, Any]:
    if not isinstance(norm, RMSNorm):
        return {}
    size = norm.group_size
    return {
        "norm_weight": norm.weight,
        "eps": norm.eps,
        "group_size": None if size == x.shape[1] else size,
    }


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this kind, has nothing hooked on it and holds its weights itself."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module._parameters.get("weight")
    # a sharded weight is a parameter too, of a type of its own
    return weight is None or type(weight) is nn.Parameter
