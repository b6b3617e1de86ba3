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
_MULTIPLE = 64  # tokens: what products like


def pays(n_tokens: int, vocabulary: int, device: torch.device) -> bool:
    """Whether the logits are more than one chunk; of fewer the plain form has no more and is as fast."""
    return 4 * n_tokens * vocabulary > _budget(device)


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
        wide = torch.float64 if kind == torch.float64 else torch.float32
        total = hidden.new_zeros((), dtype=wide)
        made: list[Tensor | None] = [None, None, None]
        if gradients:
            wanted = [ctx.needs_input_grad[i] for i in range(3)]
            made[0] = torch.empty_like(hidden, dtype=kind) if wanted[0] else None
            made[1] = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
            made[2] = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        with _exactly(hidden.device.type):
            rows, offset = weight.to(kind), None if bias is None else bias.to(kind)
            for a in range(0, hidden.shape[0], size):
                x, target = hidden[a : a + size].to(kind), targets[a : a + size]
                part, slopes = _chunk(F.linear(x, rows, offset), target, softcap, wide, gradients)
                total += part
                if slopes is not None:
                    counted = (target != IGNORE).to(kind)
                    if made[0] is not None:
                        torch.mul(slopes @ rows, counted[:, None], out=made[0][a : a + size])
                    if made[1] is not None:
                        _add_product(made[1], slopes.T, x * counted[:, None])
                    if made[2] is not None:
                        made[2] += counted @ slopes
        ctx.save_for_backward(*made)
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times that of the loss."""
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if t is None else (t * dloss).to(dtype) for t, dtype in made]
        return (*scaled, None, None, None, None, None)


def _chunk(
    logits: Tensor, targets: Tensor, softcap: float | None, wide: torch.dtype, gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of a chunk's logits (c, V), and its slopes by them in their dtype, whatever they are at ignored tokens.

    Overwrites the logits.
    """
    bent: Tensor | None = None  # tanh(l / c)
    if softcap is None:
        chances = torch.log_softmax(logits, -1, dtype=wide)
    else:
        bent = torch.tanh(logits.to(wide) / softcap)
        chances = torch.log_softmax(bent * softcap, -1)
    place = targets.clamp(min=0)[:, None]
    own = chances.gather(1, place)
    loss = -own[:, 0].masked_fill(targets == IGNORE, 0.0).sum()
    if not gradients:
        return loss, None
    # One pass over the chunk for the rounding to the logits' dtype, too.
    slopes = torch.exp(chances, out=logits if bent is None else chances)
    slopes.scatter_(1, place, torch.expm1(own).to(slopes.dtype))
    if bent is not None:
        slopes.mul_(1 - bent.square_())
    return loss, slopes.to(logits.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, added in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
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
