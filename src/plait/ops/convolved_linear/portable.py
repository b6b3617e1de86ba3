"""RMS norm, linear map and the convolution of some outputs in plain torch, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.causal_conv1d_update.portable import causal_conv1d_update
from plait.ops.norm_linear.portable import norm_linear


@torch.no_grad()
def convolved_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    group_size: int | None = None,
) -> Tensor:
    """x (R, D), weight (O, D) -> (R, O) in x's dtype; the state is changed in place."""
    y = norm_linear(x, weight, bias, norm_weight=norm_weight, eps=eps, group_size=group_size)
    own = y[:, first : first + conv_weight.shape[0]]
    own.copy_(causal_conv1d_update(own, state, conv_weight, conv_bias, activation="silu"))
    return y
