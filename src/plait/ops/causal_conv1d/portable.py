"""The causal depthwise convolution in plain torch: one pass over all rows, then the sequences' first rows again.

Dense and packed input are the same thing here: n rows (tokens) of C channels, in which S sequences begin. All rows
are convolved as if they were one sequence; only the first W-1 rows of a sequence, its head, may not see the rows
above it, and are computed again from a window of the initial state and themselves. In the backward the heads'
gradients are taken out first, so that no other gradient has a path over a boundary.

On a CPU in float32 the pass over all rows is one oneDNN convolution with channels innermost, about as fast as a
copy; otherwise it is W multiply-adds. Only the inputs are kept for the backward, which is written by hand. Time
stays in the middle, (S, T, C), without a transposing copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.chunks import compute_dtype, no_autocast

PARTIAL_SUMS = 1 << 17
"""Elements of the running sums of the weights' gradient: they stay in the second-level cache."""


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

    Packed: one row (1, n, C) with cu_seqlens (S+1,); max_len is not needed here.
    """
    with no_autocast(x):
        rows, length, channels = x.shape
        reach = weight.shape[1] - 1
        tail = None if initial_state is None else initial_state.to(x.dtype)
        n_seq = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if length == 0 or n_seq == 0:
            final = x.new_zeros(n_seq, reach, channels) if tail is None else tail.clone()
            return torch.zeros_like(x), final
        if cu_seqlens is None and length <= reach:
            # a few tokens, as in decoding: the window is the whole input
            window = _window(x, tail, reach)
            return _taps(window, weight, bias, activation, length), window[:, length:].contiguous()
        step = torch.arange(reach, device=x.device)
        if cu_seqlens is None:
            start = torch.arange(n_seq, device=x.device) * length
            inside = (step >= 0).expand(n_seq, reach)
            final = x[:, length - reach :].clone()
        else:
            start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
            inside = step < (end - start).unsqueeze(1)
            final = _final(x[0], tail, start, end, step)
        y = _Convolution.apply(
            x.reshape(rows * length, channels),
            weight,
            bias,
            tail,
            start.unsqueeze(1) + step,
            inside,
            activation == "silu",
        )
        return y.view(x.shape), final


def _final(x: Tensor, tail: Tensor | None, start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """The last W-1 inputs of every packed sequence; a short one shifts its initial tail. x (n, C)."""
    reach = step.shape[0]
    token = (end - reach).unsqueeze(1) + step
    own = token >= start.unsqueeze(1)
    index = torch.where(own, token, 0).view(-1)
    last = x.index_select(0, index).view(*token.shape, x.shape[1])
    if tail is None:
        return torch.where(own.unsqueeze(2), last, 0)
    older = (token - start.unsqueeze(1) + reach).clamp(max=max(reach - 1, 0)).clamp(min=0)
    older = torch.where(own, 0, older).unsqueeze(2).expand_as(tail)
    return torch.where(own.unsqueeze(2), last, tail.gather(1, older))


def _window(x: Tensor, tail: Tensor | None, reach: int) -> Tensor:
    """Put the W-1 inputs that came before x (S, T, C) in front of it."""
    if tail is None:
        return functional.pad(x, (0, 0, reach, 0))
    return torch.cat([tail, x], 1)


def _taps(window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, length: int) -> Tensor:
    """The convolution of a window (S, W-1+T, C) as W multiply-adds (S, T, C), for a few tokens; in x's dtype."""
    kind = compute_dtype(window)
    wide, taps = window.to(kind), weight.to(kind).unbind(1)
    y = wide[:, :length] * taps[0]
    for j in range(1, len(taps)):
        y = torch.addcmul(y, wide[:, j : j + length], taps[j])
    if bias is not None:
        y = y + bias.to(kind)
    return (functional.silu(y) if activation == "silu" else y).to(window.dtype)


class _Convolution(torch.autograd.Function):
    """x (n, C), weight (C, W), bias (C), tail (S, W-1, C), the heads' rows (S, W-1) and which exist -> y (n, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor | None,
        head: Tensor,
        inside: Tensor,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, tail, head, inside)
        ctx.silu = silu
        kind = compute_dtype(x)
        y = _convolve(x.to(kind), weight.to(kind), bias, _heads(x, tail, head, inside, kind), head, inside)
        if silu:
            functional.silu(y, inplace=True)
        return y[: x.shape[0]].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail, head, inside = ctx.saved_tensors
        kind, (n, reach) = compute_dtype(x), (x.shape[0], head.shape[1])
        with no_autocast(x):
            wide, taps = x.to(kind), weight.to(kind)
            windows = _heads(x, tail, head, inside, kind)
            grad = grads[0].to(kind)
            if ctx.silu:
                y = _convolve(wide, taps, bias, windows, head, inside)
                grad = torch.ops.aten.silu_backward(grad, y[:n])
            dbias = None if bias is None else grad.sum(0).to(bias.dtype)
            if reach == 0:
                dweight = (grad * wide).sum(0).unsqueeze(1)
                dx = (grad * taps[:, 0]).to(x.dtype)
                return dx, dweight.to(weight.dtype), dbias, None, None, None, None
            # the heads' part, through their windows; row 0 stands in for heads that do not exist
            rows = torch.where(inside, head, 0)
            ours = torch.where(inside.unsqueeze(2), grad[rows], 0)
            dwindows = torch.zeros_like(windows)
            for j in range(reach + 1):
                dwindows[:, j : j + reach].addcmul_(ours, taps[:, j])
            dhead = torch.stack([(ours * windows[:, j : j + reach]).sum((0, 1)) for j in range(reach + 1)], 1)
            # the others' part: what is left when the heads' gradients are taken out sees no boundary
            rows = rows.view(-1)
            body = grad.index_fill_(0, rows, 0) if ctx.silu else grad.index_fill(0, rows, 0)
            dx = _correlate(body, taps.flip(1), None)[reach : reach + n]
            dx.index_add_(0, rows, dwindows[:, reach:].flatten(0, 1))
            dweight = dhead + _weight_gradient(body, wide, reach + 1)
            dtail = None if tail is None else dwindows[:, :reach].to(tail.dtype)
            return dx.to(x.dtype), dweight.to(weight.dtype), dbias, dtail, None, None, None


def _heads(x: Tensor, tail: Tensor | None, head: Tensor, inside: Tensor, kind: torch.dtype) -> Tensor:
    """Each sequence's initial state and first W-1 rows, anything where it has fewer: (S, 2W-2, C)."""
    rows = x[torch.where(inside, head, 0)].to(kind)
    return _window(rows, None if tail is None else tail.to(kind), head.shape[1])


def _convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, windows: Tensor, head: Tensor, inside: Tensor
) -> Tensor:
    """Every row's sum of taps, before the activation (n + W-1, C); the last W-1 rows mean nothing."""
    if bias is not None:
        bias = bias.to(taps.dtype)
    y = _correlate(x, taps, bias)
    reach = head.shape[1]
    if reach:
        first = _taps(windows, taps, bias, None, reach)
        # heads that do not exist go to the first row that means nothing
        y.index_copy_(0, torch.where(inside, head, x.shape[0]).view(-1), first.flatten(0, 1))
    return y


def _correlate(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """y_t = bias + sum_j taps[:, j] x_{t-W+1+j} over x (n, C) with zeros on both sides: (n + W-1, C)."""
    channels, width = taps.shape
    if _has_fast_convolution(x):
        image, kernel = x.unsqueeze(0).transpose(1, 2).unsqueeze(2), taps[:, None, None]
        y = functional.conv2d(image, kernel, bias, padding=(0, width - 1), groups=channels)
        return y[0, :, 0].t()
    padded = functional.pad(x, (0, 0, width - 1, width - 1))
    rows = x.shape[0] + width - 1
    y = padded[:rows] * taps[:, 0]
    for j in range(1, width):
        y = y.addcmul_(padded[j : j + rows], taps[:, j])
    return y if bias is None else y.add_(bias)


def _has_fast_convolution(x: Tensor) -> bool:
    """Whether oneDNN convolves x; a compiler fuses the multiply-adds with what comes before and after instead."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available()


def _weight_gradient(grad: Tensor, x: Tensor, width: int) -> Tensor:
    """sum_t grad[t, c] x[t-W+1+j, c] over the rows that have W rows above and with them: (C, W)."""
    rows, channels = x.shape[0] - width + 1, x.shape[1]
    if rows <= 0:
        return x.new_zeros(channels, width)
    grad = grad[width - 1 :]
    if torch.compiler.is_compiling():
        return torch.stack([(grad * x[j : j + rows]).sum(0) for j in range(width)], 1)
    # all taps at once: row t of `windows` is x_{t} ... x_{t+W-1}, one row apart in the same memory
    windows = x.as_strided((rows, width, channels), (x.stride(0), x.stride(0), x.stride(1)))
    size = min(max(PARTIAL_SUMS // (width * channels), 16), rows)
    sums = x.new_zeros(size, width, channels)
    for t in range(0, rows, size):
        part = grad[t : t + size]
        sums[: part.shape[0]].addcmul_(part.unsqueeze(1), windows[t : t + size])
    return sums.sum(0).t()
