"""The gated RMS norm on GPUs: the Triton kernels of gpu_kernels.py as torch custom ops; only the inputs are kept.

It reads rows wherever they lie, also heads in the middle of a projection; channels have to lie side by side, or are
copied. Two runs are equal bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.gated_norm.gpu_kernels import backward_kernel, forward_kernel
from plait.ops.triton_launch import Launch
from plait.ops.triton_sums import sum_parts
from plait.ops.triton_support import KernelOp, cdiv, multiprocessors, power_of_2

TILE = 2048
"""Numbers a tile at least."""


class Config(NamedTuple):
    """How a kernel is launched for tiles of so many numbers."""

    warps: int
    tiles: int
    """Forward: tiles a program. Backward: programs a multiprocessor."""
    ahead: bool = False
    """Backward: the next tile is loaded before this one is worked on."""


FORWARD = {2048: Config(4, 1), 4096: Config(4, 2), 8192: Config(8, 1), 16384: Config(16, 1)}
BACKWARD = {2048: Config(4, 4, True), 4096: Config(16, 1, True), 8192: Config(8, 1)}
WIDE = Config(32, 1)
"""For tiles beyond the tables."""


class Call(NamedTuple):
    """All that depends on the shapes alone."""

    launch: Launch
    parts: int = 0
    add: Launch | None = None


def gated_norm(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x, z (..., E), weight (E) -> y (..., E) in ``dtype`` (x's); z None leaves the gate out, weight None: ones."""
    return NORM(x, z, weight, eps, group_size or x.shape[-1], norm_before_gate, dtype or x.dtype)


def _forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    size: int,
    norm_first: bool,
    dtype: torch.dtype,
) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    if y.numel() == 0:
        return y
    key = (x.device, (x.dtype, dtype), None if weight is None else weight.dtype, eps, size, norm_first)
    call = _forward_call(x.shape, (x.stride(), *_stride(z)), None if z is None else z.dtype, *key)
    if call is None:
        x, z = x.contiguous(), None if z is None else z.contiguous()
        call = _forward_call(x.shape, (x.stride(), *_stride(z)), None if z is None else z.dtype, *key)
        assert call is not None
    call.launch(x, x if z is None else z, x if weight is None else weight.contiguous(), y)
    return y


def _fake_forward(x, z, weight, eps, size, norm_first, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=dtype)


def _backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, size: int, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight; empty for what is None."""
    dx, dz, dweight = grads = _fake_backward(dy, x, z, weight, eps, size, norm_first)
    if x.numel() == 0:
        dweight.zero_()
        return grads
    key = (x.device, (x.dtype, dy.dtype), None if weight is None else weight.dtype, eps, size, norm_first)
    kind = None if z is None else z.dtype
    call = _backward_call(x.shape, (dy.stride(), x.stride(), *_stride(z)), kind, *key)
    if call is None:
        dy, x, z = dy.contiguous(), x.contiguous(), None if z is None else z.contiguous()
        call = _backward_call(x.shape, (dy.stride(), x.stride(), *_stride(z)), kind, *key)
        assert call is not None
    parts = dweight if weight is None else x.new_empty(call.parts, dtype=torch.float32)
    call.launch(dy, x, x if z is None else z, x if weight is None else weight.contiguous(), dx, dz, parts)
    if call.add is not None:
        call.add(parts, dweight, parts)
    return grads


def _fake_backward(dy, x, z, weight, eps, size, norm_first):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, z, weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:6]


def _gradients(ctx: Any, backward: Any, dy: Tensor | None) -> tuple[Any, ...]:
    x, z, weight = ctx.saved_tensors
    if dy is None:
        return (None,) * 7
    dx, dz, dweight = backward(dy, x, z, weight, *ctx.options)
    return dx, None if z is None else dz, None if weight is None else dweight, None, None, None, None


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


@lru_cache(maxsize=1024)
def _forward_call(
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    gate: torch.dtype | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    weight: torch.dtype | None,
    eps: float,
    size: int,
    norm_first: bool,
) -> Call | None:
    """None if the tensors have to be copied first."""
    layout = rows_of(shape, strides)
    if layout is None:
        return None
    inner, steps = layout
    rows, groups, columns = prod(shape[:-1]), shape[-1] // size, power_of_2(size)
    tile = max(TILE // columns, 1)
    c = FORWARD.get(tile * columns, WIDE)
    launch = Launch(
        forward_kernel, groups * cdiv(rows, tile * c.tiles),
        (rows, inner, groups, size, *steps[0], *steps[-1], eps, c.tiles), ROWS=tile, COLUMNS=columns,
        GATE=gate is not None, NORM_FIRST=norm_first, WEIGHT=weight is not None, num_warps=c.warps,
    )  # fmt: skip
    return Call(launch)


@lru_cache(maxsize=1024)
def _backward_call(
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    gate: torch.dtype | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    weight: torch.dtype | None,
    eps: float,
    size: int,
    norm_first: bool,
) -> Call | None:
    layout = rows_of(shape, strides)
    if layout is None:
        return None
    inner, steps = layout
    rows, groups, columns = prod(shape[:-1]), shape[-1] // size, power_of_2(size)
    tile = max(TILE // columns, 1)
    c = BACKWARD.get(tile * columns, WIDE)
    programs = min(cdiv(multiprocessors(device) * c.tiles, groups), cdiv(rows, tile))
    launch = Launch(
        backward_kernel, groups * programs,
        (rows, inner, groups, size, *steps[0], *steps[1], *steps[-1], eps), ROWS=tile, COLUMNS=columns,
        GATE=gate is not None, NORM_FIRST=norm_first, WEIGHT=weight is not None, AHEAD=c.ahead, num_warps=c.warps,
    )  # fmt: skip
    if weight is None:
        return Call(launch)
    return Call(launch, programs * shape[-1], sum_parts(programs, shape[-1], 1, shape[-1]))


def rows_of(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[int, list[tuple[int, int]]] | None:
    """See tensors (..., E) of these strides as (outer, inner, E): inner, and outer and inner stride of each.

    None if that cannot be, because some tensor would need three strides or has its channels apart.
    """
    if shape[-1] > 1 and any(stride[-1] != 1 for stride in strides):
        return None
    leading = [i for i in range(len(shape) - 1) if shape[i] != 1]
    # where two neighbouring dimensions of some tensor are not one
    cuts = [b for a, b in pairwise(leading) if any(s[a] != s[b] * shape[b] for s in strides)]
    if len(cuts) > 1:
        return None
    outer = [i for i in leading if not cuts or i < cuts[0]][-1:]
    inner = leading[-1:] if cuts else []
    steps = [(sum(s[i] for i in outer), sum(s[i] for i in inner)) for s in strides]
    return prod(shape[cuts[0] : -1]) if cuts else 1, steps


def _stride(z: Tensor | None) -> tuple[tuple[int, ...], ...]:
    return () if z is None else (z.stride(),)
