"""Mamba-2's op on CPUs: the Numba kernels of `cpu_kernels.py` as torch custom ops.

Which thread computes which task changes no number: results are equal bit for bit for any number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from torch import Tensor

from plait.ops.numba_support import direct, flat, run
from plait.ops.segments import segments
from plait.ops.ssd import cpu_kernels
from plait.ops.tiles import LANES

BLOCK = 64
"""Q, tokens a block: one state a block is kept for backward"""
_LIGHT = 4
"""updates of elements of a state that take as long as one element of a pointwise op"""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence in float32; shapes as in `plait.ops.ssd.ssd`. x may not be float64."""
    given = (x, dt, A, B, C, D, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    y, final, *_ = direct(_forward, _compute, *given, cu_seqlens, dt_softplus, low, high, save)
    return y, final


def _compute(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, final state, and for backward: steps and gates (S, T, H), states entering blocks (S*T // Q, H, padded)."""
    n_seq, (rows, length, heads, width) = _n_seq(x, cu_seqlens), x.shape
    state = B.shape[3]
    y = x.new_empty(x.shape, dtype=_written(x))
    final = x.new_empty(n_seq, heads, width, state, dtype=torch.float32)
    steps = x.new_empty(rows, length, heads, dtype=torch.float32)
    gates = torch.empty_like(steps)
    table, used = segments(n_seq, length, cu_seqlens, BLOCK)
    tile_rows, vectors = _tile(state)
    states = x.new_empty(_saved(rows, length, save), heads, _area(width, state), dtype=torch.float32)
    states[used:] = 0
    share = _share(n_seq, heads, B.shape[2])
    parts = B.shape[2] * -(-(heads // B.shape[2]) // share)
    inputs = _inputs(x, B, C)
    run(
        cpu_kernels.forward,
        n_seq * parts,
        rows * length * heads * width * state // _LIGHT,
        ((0,) * vectors,) * tile_rows,
        (length, heads, width, B.shape[2], state, share, BLOCK, parts),
        table,
        *inputs[:2],
        *_flat(dt.float()),
        *inputs[2:],
        _numbers(A),
        _numbers(A.new_zeros(heads) if dt_bias is None else dt_bias),
        _skip(x, D),
        _numbers(A.new_zeros(0) if initial is None else initial),
        np.float32(low),
        np.float32(high),
        softplus,
        *(flat(t) for t in (y, final, steps, gates, states)),
    )
    return y.to(x.dtype), final, steps, gates, states


_forward = torch.library.custom_op("plait::ssd_cpu", _compute, mutates_args=(), device_types="cpu")


@_forward.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, softplus, low, high, save):  # type: ignore[no-untyped-def]
    rows, length, heads, width = x.shape
    steps = x.new_empty(rows, length, heads, dtype=torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty(_n_seq(x, cu_seqlens), heads, width, B.shape[3], dtype=torch.float32),
        steps,
        torch.empty_like(steps),
        x.new_empty(_saved(rows, length, save), heads, _area(width, B.shape[3]), dtype=torch.float32),
    )


@torch.library.custom_op("plait::ssd_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    steps: Tensor,
    gates: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state; empty for what was not given."""
    n_seq, (rows, length, heads, width) = _n_seq(x, cu_seqlens), x.shape
    groups, state = B.shape[2:]
    dx, ddt = x.new_empty(x.shape, dtype=_written(x)), torch.empty_like(steps)
    dinitial = x.new_empty(n_seq, heads, width, state, dtype=torch.float32)
    sums = np.empty((n_seq, heads, width + 2))
    table, used = segments(n_seq, length, cu_seqlens, BLOCK)
    if used > states.shape[0]:
        raise RuntimeError("ssd: backward needs the states that forward was told not to keep")
    tile_rows, vectors = _tile(state)
    share = _share(n_seq, heads, groups)
    partial = -(-(heads // groups) // share)
    db, dc = (x.new_empty(partial, *B.shape, dtype=torch.float32) for _ in "BC")
    inputs = _inputs(x, B, C)
    run(
        cpu_kernels.backward,
        n_seq * groups * partial,
        3 * rows * length * heads * width * state // _LIGHT,
        ((0,) * vectors,) * tile_rows,
        (length, heads, width, groups, state, share, BLOCK, groups * partial),
        table,
        *inputs[:2],
        *_flat(dy.to(_written(x))),
        *inputs[2:],
        _numbers(A),
        _skip(x, D),
        _numbers(A.new_zeros(0) if initial is None else initial),
        _numbers(A.new_zeros(0) if dfinal is None else dfinal),
        np.float32(low),
        np.float32(high),
        softplus,
        *(flat(t) for t in (steps, gates, states, dx, ddt, db, dc, dinitial)),
        sums.reshape(-1),
    )
    total = torch.from_numpy(sums.sum(0))
    dskip = total[:, :-2] if D is not None and D.dim() == 2 else total[:, :-2].sum(1)
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        total[:, -2].to(A.dtype, copy=True),
        _added(db, B.dtype),
        _added(dc, C.dtype),
        x.new_empty(0) if D is None else dskip.to(D.dtype).contiguous(),
        x.new_empty(0) if dt_bias is None else total[:, -1].to(dt_bias.dtype, copy=True),
        x.new_empty(0) if initial is None else dinitial.to(initial.dtype),
    )


@_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial, *_):  # type: ignore[no-untyped-def]
    of = [x, dt, A, B, C, D, dt_bias, initial]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in of)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:9], *output[2:])
    ctx.options = inputs[9:12]


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *given, steps, gates, states = ctx.saved_tensors
    dy = torch.zeros_like(given[0]) if dy is None else dy
    grads = _backward(dy, dfinal, *given, *ctx.options, steps, gates, states)
    of = (None if t is None else grad for t, grad in zip(given, grads, strict=False))
    return (*of, *(None for _ in range(5)))


_forward.register_autograd(_gradients, setup_context=_remember)


def _n_seq(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _saved(rows: int, length: int, save: bool) -> int:
    """A bound of the states to keep that does not depend on where the documents lie."""
    return rows * (length // BLOCK) if save else 0


@cache
def _tiles() -> tuple[tuple[int, int], ...]:
    """The tiles (rows, vectors of 16 lanes) that fit this machine's registers, with some to spare."""
    return ((4, 4), (8, 2), (8, 1)) if llvm.get_host_cpu_features().get("avx512f") else ((4, 1),)


def _tile(state: int) -> tuple[int, int]:
    """The tile that covers `state` with the least work: padded lanes, and some work a tile whatever its width."""
    best, least = (4, 1), -1
    for rows, vectors in _tiles():
        lanes = vectors * LANES
        work = -(-state // lanes) * (lanes + 16)
        if least < 0 or work < least:
            best, least = (rows, vectors), work
    return best


def _area(width: int, state: int) -> int:
    """Elements of one head's padded state."""
    rows, vectors = _tile(state)
    lanes = vectors * LANES
    return -(-width // rows) * rows * (-(-state // lanes) * lanes)


def _share(n_seq: int, heads: int, groups: int) -> int:
    """Heads a task. Two halve the summands of dB and dC; one, if else there were too few tasks."""
    return 2 if n_seq >= 4 and (heads // groups) % 2 == 0 else 1


def _written(x: Tensor) -> torch.dtype:
    """The dtype that the kernels write for x: its own, or float32 where they have no other."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _inputs(*tensors: Tensor) -> list[Any]:
    """Each tensor's flat array and strides: all bfloat16 or all float32."""
    if not all(t.dtype == torch.bfloat16 for t in tensors):
        tensors = tuple(t.float() for t in tensors)
    return [item for t in tensors for item in _flat(t)]


def _flat(t: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """What t spans, and its first three strides; the channels or states of a token lie together."""
    if t.numel() and t.dim() == 4 and t.stride(3) != 1:
        t = t.contiguous()
    return flat(t), t.stride()[:3]


def _numbers(t: Tensor) -> np.ndarray:
    """All elements in order, as float32."""
    return np.from_dlpack(t.detach().float().contiguous().view(-1))


def _skip(x: Tensor, D: Tensor | None) -> np.ndarray:
    """D of every channel (H * P,); zeros for none."""
    shape = x.shape[2:]
    if D is None:
        return np.zeros(shape.numel(), np.float32)
    return _numbers(D if D.dim() == 2 else D.unsqueeze(1).expand(shape))


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over dim 0 in order, in `dtype`."""
    total = parts[0]
    for i, part in enumerate(parts[1:]):
        total = total + part if i == 0 else total.add_(part)
    return total.to(dtype)
