"""Mamba-1's selective scan on CPUs: the Numba kernels of `cpu_kernels.py` as torch custom ops.

It likes channels side by side, (S, T, E) as projections give them; only tokens that lie otherwise are copied. Which
thread computes which task changes no number: results are equal bit for bit for any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.numba_run import direct, flat, numbers, run, tokens, written
from plait.ops.segments import count_sequences, segments
from plait.ops.selective_scan import cpu_kernels
from plait.ops.tiles import LANES

BLOCK = 128
"""Q, tokens a block: one state a block is kept for backward"""
SHARE = 16
"""blocks of 16 channels that a task of backward adds up in dB and dC"""
TOGETHER = 8
"""blocks of 16 channels that a task of forward takes at most"""
_LIGHT = 2
"""updates of elements of the state that take as long as one element of a pointwise op"""


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's recurrence in float32; shapes as in `plait.ops.selective_scan`. x may not be float64."""
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, final, _ = direct(_forward, _compute, *given, cu_seqlens, dt_softplus, save)
    return y, final


def _compute(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and for backward the states entering blocks (S*T // Q, blocks, N padded, 16)."""
    n_seq, (n_rows, length, channels) = count_sequences(x, cu_seqlens), x.shape
    states, groups = A.shape[1], _groups(B)
    table, used = segments(n_seq, length, cu_seqlens, BLOCK)
    blocks, deep, tile_rows = _tiling(channels, groups, states)
    y = x.new_empty(x.shape, dtype=written(x))
    final = x.new_empty(n_seq, channels, states, dtype=torch.float32)
    marks = x.new_empty(_saved(n_rows, length, save), blocks, deep, LANES, dtype=torch.float32)
    marks[used:] = 0
    # side by side, so that a task reads whole stretches of a row; fewer where many threads want tasks
    share = max(1, min(TOGETHER, n_seq * blocks // (4 * torch.get_num_threads())))
    run(
        cpu_kernels.forward,
        n_seq * -(-blocks // share),
        n_rows * length * channels * states // _LIGHT,
        ((0,),) * tile_rows,
        (length, channels, groups, states, deep, BLOCK, blocks, share),
        table,
        *tokens(x, dt, x.new_empty(0, 0, 0) if z is None else z),
        *(_keys(t, deep) for t in (B, C)),
        *(numbers(t, channels) for t in (A, D, dt_bias)),
        numbers(initial, 0),
        softplus,
        z is not None,
        *(flat(t) for t in (y, final, marks)),
    )
    return y.to(x.dtype), final, marks


_forward = torch.library.custom_op("plait::selective_scan_cpu", _compute, mutates_args=(), device_types="cpu")


@_forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, softplus, save):  # type: ignore[no-untyped-def]
    rows, length, channels = x.shape
    blocks, deep, _ = _tiling(channels, _groups(B), A.shape[1])
    return (
        x.new_empty(x.shape),
        x.new_empty(count_sequences(x, cu_seqlens), channels, A.shape[1], dtype=torch.float32),
        x.new_empty(_saved(rows, length, save), blocks, deep, LANES, dtype=torch.float32),
    )


@torch.library.custom_op("plait::selective_scan_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    marks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty for what was not given."""
    n_seq, (n_rows, length, channels) = count_sequences(x, cu_seqlens), x.shape
    states, groups = A.shape[1], _groups(B)
    table, used = segments(n_seq, length, cu_seqlens, BLOCK)
    if used > marks.shape[0]:
        raise RuntimeError("selective_scan: backward needs the states that forward was told not to keep")
    blocks, deep, _ = _tiling(channels, groups, states)
    parts = -(-(blocks // groups) // SHARE)
    dx, ddt = (x.new_empty(x.shape, dtype=written(x)) for _ in "xd")
    dz = x.new_empty(x.shape if z is not None else (0,), dtype=written(x))
    db, dc = (x.new_empty(parts, n_rows, length, groups, deep, dtype=torch.float32) for _ in "bc")
    da, dinitial = (x.new_empty(n_seq, channels, states, dtype=torch.float32) for _ in "as")
    sums = x.new_zeros(n_seq, 2, channels, dtype=torch.float32)
    run(
        cpu_kernels.backward,
        n_seq * groups * parts,
        3 * n_rows * length * channels * states // _LIGHT,
        ((0,),) * min(deep, _BACKWARD_ROWS),
        (length, channels, groups, states, deep, BLOCK, blocks, SHARE, parts),
        table,
        *tokens(x, dt, x.new_empty(0, 0, 0) if z is None else z, dy),
        *(_keys(t, deep) for t in (B, C)),
        *(numbers(t, channels) for t in (A, D, dt_bias)),
        *(numbers(t, 0) for t in (initial, dfinal)),
        flat(marks),
        softplus,
        z is not None,
        *(flat(t) for t in (dx, ddt, dz, db, dc, da, dinitial, sums)),
    )
    dskip, dbias = sums.sum(0)
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        da.sum(0).to(A.dtype),
        _keys_gradient(db, B),
        _keys_gradient(dc, C),
        x.new_empty(0) if D is None else dskip.to(D.dtype, copy=True),
        x.new_empty(0) if z is None else dz.to(z.dtype),
        x.new_empty(0) if dt_bias is None else dbias.to(dt_bias.dtype, copy=True),
        x.new_empty(0) if initial is None else dinitial.to(initial.dtype),
    )


@_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial, *_):  # type: ignore[no-untyped-def]
    of = [x, dt, A, B, C, D, z, dt_bias, initial]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in of)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:10], output[2])
    ctx.softplus = inputs[10]


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, marks = ctx.saved_tensors
    dy = torch.zeros_like(given[0]) if dy is None else dy
    grads = _backward(dy, dfinal, *given, ctx.softplus, marks)
    return (*(None if t is None else grad for t, grad in zip(given, grads, strict=False)), None, None, None)


_forward.register_autograd(_gradients, setup_context=_remember)

_FORWARD_ROWS, _BACKWARD_ROWS = 16, 8
"""States a tile: forward keeps h and A in registers, backward four tiles, which wider ones would spill."""


def _groups(B: Tensor) -> int:
    return B.shape[2] if B.dim() == 4 else 1


def _tiling(channels: int, groups: int, states: int) -> tuple[int, int, int]:
    """Blocks of 16 channels, none across two groups; N in whole tiles of backward; states a tile of forward."""
    blocks = groups * -(-(channels // groups) // LANES)
    rows = min(_BACKWARD_ROWS, 1 << (states - 1).bit_length())
    deep = -(-states // rows) * rows
    return blocks, deep, _FORWARD_ROWS if deep % _FORWARD_ROWS == 0 else rows


def _saved(rows: int, length: int, save: bool) -> int:
    """A bound of the states to keep that does not depend on where the documents lie."""
    return rows * (length // BLOCK) if save else 0


def _keys(B: Tensor, deep: int) -> np.ndarray:
    """B or C as float32 (S, T, G, N padded with zeros), flat."""
    missing = deep - B.shape[-1]
    return flat((functional.pad(B.float(), (0, missing)) if missing else B.float()).contiguous())


def _keys_gradient(parts: Tensor, B: Tensor) -> Tensor:
    """The sum of the tasks' summands (parts, S, T, G, N padded), as B or C is."""
    return parts.sum(0)[..., : B.shape[-1]].reshape(B.shape).to(B.dtype).contiguous()
