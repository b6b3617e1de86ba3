"""One new token of the causal convolution on CPUs: one Numba kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.causal_conv1d_update import portable
from plait.ops.causal_conv1d_update.cpu_kernels import CHANNELS, CONVOLVE
from plait.ops.norm_linear.cpu import KNOWN, known, together
from plait.ops.numba_team import address, call


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """x (S, C), state (S, W-1, C), changed in place -> (S, C) in x's dtype, float32 or bfloat16.

    States in other dtypes, and traces of torch.compile, are served by `portable`'s operations.
    """
    if state.dtype not in KNOWN or torch.compiler.is_compiling():
        return portable.causal_conv1d_update(x, state, weight, bias, activation=activation)
    y = x.new_empty(x.shape)
    convolve(x, state, weight, bias, activation == "silu", y)
    return y


def convolve(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, y: Tensor) -> None:
    """Into y (S, C), contiguous, float32 or bfloat16, as are x and the state."""
    (n_seq, channels), width = x.shape, weight.shape[1]
    x, weight, bias = together(x), known(weight), None if bias is None else known(bias)
    call(
        CONVOLVE,
        n_seq * -(-channels // CHANNELS),
        channels,
        width,
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        x.stride(0),
        state.data_ptr(),
        state.dtype is torch.bfloat16,
        weight.data_ptr(),
        weight.dtype is torch.bfloat16,
        address(bias),
        bias is not None and bias.dtype is torch.bfloat16,
        silu,
        y.data_ptr(),
        y.dtype is torch.bfloat16,
        keep=(x, state, weight, bias, y),
    )
