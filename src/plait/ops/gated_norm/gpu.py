"""The gated RMS norm on GPUs: the Triton kernels of gpu_kernels.py as torch custom ops; only the inputs are kept.

It reads rows in any order, channels side by side fastest. Two runs are equal bit for bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.gated_norm.gpu_kernels import backward_kernel, forward_kernel
from plait.ops.triton_sums import sum_parts
from plait.ops.triton_support import KernelOp, cdiv, multiprocessors, on_device, power_of_2

TILE = 2048
"""Numbers a tile at least."""


class Config(NamedTuple):
    """How a kernel is launched for tiles of so many numbers."""

    warps: int
    tiles: int
    """Forward: tiles a program. Backward: programs a multiprocessor."""
    ahead: bool = False
    """Backward: load the next tile before this one is worked on."""


FORWARD = {2048: Config(4, 1), 4096: Config(8, 1), 8192: Config(16, 1)}
BACKWARD = {2048: Config(8, 3, True), 4096: Config(16, 1, True), 8192: Config(32, 1)}
WIDE = Config(32, 1)
"""For tiles beyond the tables."""


def gated_norm(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """x, z (..., E), weight (E) -> y (..., E) in x's dtype; z None leaves the gate out, weight None means ones."""
    return NORM(x, z, weight, eps, group_size or x.shape[-1], norm_before_gate)


def _forward(
    x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, size: int, norm_first: bool
) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    (x, *rest), inner = _rows(x, *([] if z is None else [z]))
    gate = rest[0] if rest else x
    rows, groups = x.shape[0] * x.shape[1], x.shape[2] // size
    columns = power_of_2(size)
    tile = max(TILE // columns, 1)
    c = FORWARD.get(tile * columns, WIDE)
    with on_device(x):
        forward_kernel[(groups * cdiv(rows, tile * c.tiles),)](
            x, gate, x if weight is None else weight.contiguous(), y, rows, inner, groups, size, *x.stride(),
            *gate.stride(), eps, c.tiles, ROWS=tile, COLUMNS=columns, GATE=z is not None, NORM_FIRST=norm_first,
            WEIGHT=weight is not None, num_warps=c.warps,
        )  # fmt: skip
    return y


def _fake_forward(x, z, weight, eps, size, norm_first):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, size: int, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight; empty for what is None."""
    dx, dz, dweight = grads = _fake_backward(dy, x, z, weight, eps, size, norm_first)
    if x.numel() == 0:
        dweight.zero_()
        return grads
    (dy, x, *rest), inner = _rows(dy, x, *([] if z is None else [z]))
    gate = rest[0] if rest else x
    rows, groups = x.shape[0] * x.shape[1], x.shape[2] // size
    columns = power_of_2(size)
    tile = max(TILE // columns, 1)
    c = BACKWARD.get(tile * columns, WIDE)
    programs = min(cdiv(multiprocessors(x.device) * c.tiles, groups), cdiv(rows, tile))
    parts = x.new_empty(0 if weight is None else programs * x.shape[2], dtype=torch.float32)
    with on_device(x):
        backward_kernel[(groups * programs,)](
            dy, x, gate, x if weight is None else weight.contiguous(), dx, dz, parts, rows, inner, groups, size,
            *dy.stride(), *x.stride(), *gate.stride(), eps, ROWS=tile, COLUMNS=columns, GATE=z is not None,
            NORM_FIRST=norm_first, WEIGHT=weight is not None, AHEAD=c.ahead, num_warps=c.warps,
        )  # fmt: skip
    if weight is not None:
        sum_parts(parts, dweight)
    return grads


def _fake_backward(dy, x, z, weight, eps, size, norm_first):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, z, weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gradients(ctx: Any, backward: Any, dy: Tensor | None) -> tuple[Any, ...]:
    x, z, weight = ctx.saved_tensors
    if dy is None:
        return (None,) * 6
    dx, dz, dweight = backward(dy, x, z, weight, *ctx.options)
    return dx, None if z is None else dz, None if weight is None else dweight, None, None, None


NORM = KernelOp(
    "gated_norm_gpu",
    _forward,
    _backward,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
"""The norm with its gradient."""


def _rows(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors (..., E) as views (outer, inner, E), and inner; copies where more than two strides are needed."""
    shape = tensors[0].shape
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1, 1, shape[-1]) for t in tensors], 1
    leading = [i for i in range(len(shape) - 1) if shape[i] != 1]
    # where two neighbouring dimensions of some tensor cannot be seen as one
    cuts = [b for a, b in pairwise(leading) if not all(_joins(t, a, b) for t in tensors)]
    cut = cuts[-1] if cuts else len(shape) - 1
    outer, inner = shape[:cut].numel(), shape[cut:-1].numel()
    return [t.reshape(outer, inner, shape[-1]) for t in tensors], inner


def _joins(x: Tensor, a: int, b: int) -> bool:
    return x.stride(a) == x.stride(b) * x.shape[b]
