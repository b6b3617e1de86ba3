"""The causal depthwise convolution on CPUs: two custom ops around the Numba kernels.

Dense and packed input are the same thing here: n rows of C channels in which S sequences begin. Only the inputs are
kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.causal_conv1d import cpu_kernels
from plait.ops.numba_support import array, run


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x (S, T, C), weight (C, W), bias (C) -> y (S, T, C), the last W-1 inputs (S, W-1, C) in x's dtype.

    Packed: one row (1, n, C) with cu_seqlens (S+1,); max_len is not needed here. x float32 or bfloat16.
    """
    rows, length, channels = x.shape
    if cu_seqlens is None:
        bounds = torch.arange(rows + 1, device=x.device) * length
    else:
        bounds = cu_seqlens.long()
    tail = None if initial_state is None else initial_state.to(x.dtype)
    y, final = _forward(x.reshape(rows * length, channels), weight, bias, tail, bounds, activation == "silu")
    return y.view(x.shape), final


@torch.library.custom_op("plait::causal_conv1d_cpu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, bounds: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """x (n, C), weight (C, W), bias (C), tail (S, W-1, C), bounds (S+1,) -> y (n, C), final (S, W-1, C)."""
    x, taps, w, b = _arguments(x, weight, bias)
    y, final = _outputs(x, weight, bounds)
    states, ends = _states(tail, x), bounds.numpy()
    run(
        cpu_kernels.forward,
        _tasks(x),
        x.numel(),
        array(x),
        w,
        b,
        states,
        ends,
        array(y),
        array(final),
        taps,
        silu or None,
    )
    return y, final


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, bounds: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, bounds)


@torch.library.custom_op("plait::causal_conv1d_cpu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    bounds: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x (n, C), weight (C, W), bias (C) and tail (S, W-1, C), the last empty without a tail."""
    dx, dweight, dbias, dtail = _gradients(x, weight, bias, tail)
    x, taps, w, b = _arguments(x, weight, bias)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    sums = torch.empty(_blocks(x), len(taps) + 1, x.shape[1])
    states, ends = (_states(dfinal, x), _states(tail, x)), bounds.numpy()
    run(
        cpu_kernels.backward,
        _tasks(x),
        x.numel(),
        array(dy),
        states[0],
        array(x),
        w,
        b,
        states[1],
        ends,
        array(dx),
        array(dtail),
        sums.numpy(),
        taps,
        silu or None,
    )
    # numpy adds the blocks one after the other, whatever the number of threads
    total = torch.from_numpy(sums.numpy().sum(0))
    dweight.copy_(total[:-1].t())
    dbias.copy_(total[-1])
    return dx, dweight, dbias, dtail


@_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    bounds: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, tail)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, tail, bounds = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dtail = _backward(dy, dfinal, x, weight, bias, tail, bounds, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if tail is None else dtail, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def _blocks(x: Tensor) -> int:
    """Runs of rows; one for no rows, because sequences without tokens have states too."""
    return max(-(-x.shape[0] // cpu_kernels.ROWS), 1)


def _tasks(x: Tensor) -> int:
    return _blocks(x) * -(-x.shape[1] // cpu_kernels.CHANNELS)


def _outputs(x: Tensor, weight: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Room for y (n, C) and final (S, W-1, C)."""
    n, channels = x.shape
    return x.new_empty(n, channels), x.new_empty(bounds.shape[0] - 1, weight.shape[1] - 1, channels)


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients."""
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(x.shape[1]),
        x.new_empty(0, weight.shape[1] - 1, x.shape[1]) if tail is None else tail.new_empty(tail.shape),
    )


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[int, ...], Any, Any]:
    """x with its channels side by side, the tuple that says W, the taps (W, C) and the bias (C) in float32."""
    width, channels = weight.shape[1], weight.shape[0]
    w = weight.detach().t().float().contiguous().numpy()
    b = torch.zeros(channels) if bias is None else bias.detach().float().contiguous()
    return x if x.stride(1) == 1 else x.contiguous(), (0,) * width, w, b.numpy()


def _states(states: Tensor | None, x: Tensor) -> Any:
    """States (S, W-1, C) for the kernels; none are an array of the same kind with S = 0."""
    return array(x.new_empty(0, 0, 0) if states is None else states.contiguous())
