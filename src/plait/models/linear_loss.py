"""An output map and its cross-entropy in one, over chunks of tokens: all logits are never in memory at once.

Forward makes a chunk's logits and, since they are there, the gradients of hidden states and weight, which backward only
scales: as many products as with all logits at hand, and nothing is computed twice.

    l = x W^T + b, capped as c tanh(l / c);  loss = sum over tokens of (log sum exp(l) - l[target])
    dl = softmax(l) - onehot(target);        dx = dl W,  dW = dl^T x,  db = sum over tokens of dl
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.models.loss import IGNORE

# Bytes of a chunk's logits in float32: enough tokens to keep products efficient, few beside a model's activations.
_BYTES_CPU, _BYTES_GPU = 1 << 26, 1 << 29
_BYTES_CACHE = 1 << 21  # bytes of logits that passes over them find in a core's cache
_MULTIPLE = 64  # tokens: what products like


def pays(n_tokens: int, vocabulary: int, device: torch.device) -> bool:
    """Whether the logits are worth it: on a GPU more than one chunk, on a CPU a good part of one.

    Of fewer the plain form has no more and is as fast. On a CPU its four tensors of that size, and a gradient of the
    weight that an embedding's cannot be added to in place, already cost.
    """
    return 4 * n_tokens * vocabulary > _budget(device) // (4 if device.type == "cpu" else 1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over targets that are not -100, in nats, and their number; once differentiable.

    hidden (..., d), weight (V, d), bias (V,), targets (...) of ids below V; chunk: tokens at a time (None: by a budget
    of bytes). Products are in autocast's dtype where it is on; the softmax, and sums over chunks, in float32 (float64
    for float64).
    """
    x, flat = hidden.flatten(0, -2), targets.flatten()
    device = x.device.type
    kind = x.dtype
    if (
        kind != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        kind = torch.get_autocast_dtype(device)
    size = chunk or max(_MULTIPLE, _budget(x.device) // (4 * weight.shape[0]) // _MULTIPLE * _MULTIPLE)
    gradients = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    loss: Tensor = _Loss.apply(x, weight, bias, flat, softcap, kind, size, gradients)
    return loss, (flat != IGNORE).sum()


class _Loss(torch.autograd.Function):
    """See ``linear_cross_entropy``; ``kind`` is the dtype of products, ``size`` the tokens of a chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        kind: torch.dtype,
        size: int,
        gradients: bool,
    ) -> Tensor:
        """The sum of the losses; what backward needs are the gradients themselves."""
        wanted = [gradients and need for need in ctx.needs_input_grad[:3]]
        total, ctx.made = _pass(hidden, weight, bias, targets, softcap, kind, size, wanted)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = (softcap, kind, size, wanted)
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times that of the loss, in place: a second backward of the same loss makes them again."""
        made = ctx.made or _pass(*ctx.saved_tensors, *ctx.options)[1]
        ctx.made = None
        scaled = [
            None if t is None else t.mul_(dloss).to(dtype) for t, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    kind: torch.dtype,
    size: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum of the losses, and its gradients by hidden, weight and bias as far as wanted."""
    wide = torch.float64 if kind == torch.float64 else torch.float32
    total = hidden.new_zeros((), dtype=wide)
    dx = torch.empty_like(hidden, dtype=kind) if wanted[0] else None
    # the first chunk overwrites it
    dweight = (
        (torch.empty_like if len(hidden) else torch.zeros_like)(weight, dtype=wide) if wanted[1] else None
    )
    dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
    with _exactly(hidden.device.type):
        rows, offset = weight.to(kind), None if bias is None else bias.to(kind)
        for a in range(0, hidden.shape[0], size):
            x, target = hidden[a : a + size].to(kind), targets[a : a + size]
            slopes = F.linear(x, rows, offset)
            total += _to_slopes(slopes, target, softcap, wide, any(wanted))
            if any(wanted):
                counted = (target != IGNORE).to(kind)
                if dx is not None:
                    torch.mul(slopes @ rows, counted[:, None], out=dx[a : a + size])
                if dweight is not None:
                    _add_product(dweight, slopes.T, x * counted[:, None], fresh=a == 0)
                if dbias is not None:
                    dbias += counted @ slopes
    return total, [dx, dweight, dbias]


def _to_slopes(
    logits: Tensor, targets: Tensor, softcap: float | None, wide: torch.dtype, gradients: bool
) -> Tensor:
    """The loss of logits (c, V); with ``gradients`` they become its slopes, whatever those are at ignored tokens."""
    rows = max(1, _BYTES_CACHE // (4 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.stack([_rows_to_slopes(*part, softcap, wide, gradients) for part in parts]).sum()


def _rows_to_slopes(
    logits: Tensor, targets: Tensor, softcap: float | None, wide: torch.dtype, gradients: bool
) -> Tensor:
    """See ``_to_slopes``: for rows that fit a cache, so that several passes cost little more than one."""
    bent: Tensor | None = None  # tanh(l / c)
    if softcap is None:
        chances = torch.log_softmax(logits, -1, dtype=wide)
    else:
        bent = torch.tanh(logits.to(wide) / softcap)
        chances = torch.log_softmax(bent * softcap, -1)
    place = targets.clamp(min=0)[:, None]
    own = chances.gather(1, place)
    if gradients:
        # One pass for the rounding to the logits' dtype, too.
        slopes = torch.exp(chances, out=logits if bent is None else chances)
        slopes.scatter_(1, place, torch.expm1(own).to(slopes.dtype))
        if bent is not None:
            torch.mul(slopes, 1 - bent.square_(), out=logits)
    return -own[:, 0].masked_fill(targets == IGNORE, 0.0).sum()


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """total += a b, added in total's precision; fresh: total = a b, whatever it holds."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if fresh else 1)
        return
    if fresh:
        total.zero_()
    if total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif a.dtype == torch.float16:  # whose range a sum over many tokens may leave
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total += a @ b


def _exactly(device: str) -> AbstractContextManager[object]:
    """Operations in the dtypes of what they are given."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _budget(device: torch.device) -> int:
    return _BYTES_CPU if device.type == "cpu" else _BYTES_GPU
