"""The causal depthwise convolution on CPUs: two custom ops around the Numba kernels.

Dense and packed input are the same thing here: n rows of C channels in which S sequences begin. Only the inputs are
kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.causal_conv1d import cpu_kernels, portable
from plait.ops.numba_run import flat, rows, run


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
    n_rows, length, channels = x.shape
    if cu_seqlens is None and 0 < length < weight.shape[1]:
        # a token or a few, as in decoding: a call of a custom op costs more than the work
        return portable.causal_conv1d(x, weight, bias, activation=activation, initial_state=initial_state)
    if cu_seqlens is None:
        bounds = torch.arange(n_rows + 1, device=x.device) * length
    else:
        bounds = cu_seqlens.long()
    tail = None if initial_state is None else initial_state.to(x.dtype)
    y, final = _forward(
        x.reshape(n_rows * length, channels), weight, bias, tail, bounds, activation == "silu"
    )
    return y.view(x.shape), final


@torch.library.custom_op("plait::causal_conv1d_cpu", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, bounds: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """x (n, C), weight (C, W), bias (C), tail (S, W-1, C), bounds (S+1,) -> y (n, C), final (S, W-1, C)."""
    taps, w, b = _parameters(weight, bias)
    y, final = _outputs(x, weight, bounds)
    run(
        cpu_kernels.forward,
        _tasks(x),
        x.numel(),
        *x.shape,
        *rows(x),
        w,
        b,
        _states(tail, x),
        bounds.numpy(),
        flat(y),
        flat(final),
        taps,
        silu or None,
    )
    return y, final


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, bounds: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, bounds)


@torch.library.custom_op("plait::causal_conv1d_cpu_backward", mutates_args=(), device_types="cpu")
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
    taps, w, b = _parameters(weight, bias)
    sums = torch.empty(_blocks(x), len(taps) + 1, x.shape[1])
    run(
        cpu_kernels.backward,
        _tasks(x),
        x.numel(),
        *x.shape,
        *rows(dy),
        _states(dfinal, x),
        *rows(x),
        w,
        b,
        _states(tail, x),
        bounds.numpy(),
        flat(dx),
        flat(dtail),
        flat(sums),
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


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[tuple[int, ...], Any, Any]:
    """The tuple that says W, the taps (W, C) and the bias (C) in float32."""
    channels, width = weight.shape
    b = torch.zeros(channels) if bias is None else bias.float().contiguous()
    return (0,) * width, flat(weight.t().float().contiguous()), flat(b)


def _states(states: Tensor | None, x: Tensor) -> Any:
    """States (S, W-1, C) for the kernels; none are an empty array of the same kind."""
    return flat(x.new_empty(0) if states is None else states.contiguous())
