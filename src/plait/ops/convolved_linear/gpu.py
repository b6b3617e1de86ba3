"""Norm, linear map and the convolution of some outputs on GPUs: the kernels of `norm_linear`, which end with it."""

from __future__ import annotations

from torch import Tensor

from plait.ops.causal_conv1d_update.gpu import causal_conv1d_update
from plait.ops.norm_linear import gpu as norm_linear
from plait.ops.triton_steps import StepOp


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
    if x.shape[0] > norm_linear.ROWS:
        y = norm_linear.norm_linear(x, weight, bias, norm_weight=norm_weight, eps=eps, group_size=group_size)
        own = y[:, first : first + conv_weight.shape[0]]
        own.copy_(causal_conv1d_update(own, state, conv_weight, conv_bias, activation="silu"))
        return y
    groups = 0 if eps is None else x.shape[1] // (group_size or x.shape[1])
    return MAP(x, weight, bias, norm_weight, eps or 0.0, groups, first, state, conv_weight, conv_bias)


def _map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    groups: int,
    first: int,
    state: Tensor,
    taps: Tensor,
    conv_bias: Tensor | None,
) -> Tensor:
    """groups 0: no norm."""
    window = norm_linear.Window(first, state, taps, conv_bias)
    return norm_linear.launch(x, weight, bias, norm_weight, None, eps, groups, window)


def _fake(x, weight, bias, norm_weight, eps, groups, first, state, taps, conv_bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


MAP = StepOp("convolved_linear_gpu", _map, _fake, ("state",))
"""The kernels as a custom op."""
