"""RMS norm, linear map and residual in plain torch: for any device, and for more rows than kernels serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.chunks import compute_dtype, no_autocast


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
    """x (R, D), weight (O, D) -> (R, O) in x's dtype; the product is one of torch's."""
    with no_autocast(x):
        if eps is not None:
            u = x.to(compute_dtype(x)).unflatten(-1, (-1, group_size or x.shape[-1]))
            u = (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)).flatten(-2)
            if norm_weight is not None:
                u = u * norm_weight.to(u.dtype)
            x = u.to(x.dtype)
        y = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return y if residual is None else residual.to(x.dtype) + y
