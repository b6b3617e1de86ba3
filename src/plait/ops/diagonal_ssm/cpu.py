"""The time-invariant diagonal state-space model on CPUs: the Numba kernels of `cpu_kernels.py` as torch custom ops.

The ops take complex numbers as pairs, (E, N, 2), and real ones as (E, N, 1). Which thread computes which task changes
no number: results are equal bit for bit for any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.ops.chunks import no_autocast
from plait.ops.diagonal_ssm import cpu_kernels
from plait.ops.numba_run import direct, flat, numbers, run, tokens, written
from plait.ops.segments import count_sequences, segments
from plait.ops.tiles import LANES

_TASKS = 64
"""Tasks that are enough: fewer sequences a task cost more sums of gradients."""
_LIGHT = 2
"""updates of elements of the state that take as long as one element of a pointwise op"""


def diagonal_ssm(
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x (S, T, E), dA, B, C (E, N), D (E) -> y (S, T, E), final state (S, E, N), or (S, E, N, 2) if complex.

    Packed: one row (1, n, E) with cu_seqlens (S+1,); max_len is not needed here. Computes in float32; x may not be
    float64.
    """
    with no_autocast(x):
        turning = dA.is_complex()
        if turning:
            dA, B, C = (torch.view_as_real(t) for t in (dA, B, C))
            C = torch.stack([2 * C[..., 0], -2 * C[..., 1]], -1)
        else:
            dA, B, C = (t.unsqueeze(-1) for t in (dA, B, C))
            initial_state = None if initial_state is None else initial_state.unsqueeze(-1)
        given = (x, dA, B, C, D, initial_state)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        y, final, _ = direct(_forward, _compute, *given, cu_seqlens, save)
        return y, final if turning else final.squeeze(-1)


def _compute(
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (S, E, N, pair), and for backward the states entering blocks, in tiles."""
    n_seq, (_, length, channels) = count_sequences(x, cu_seqlens), x.shape
    table, used = segments(n_seq, length, cu_seqlens, cpu_kernels.BLOCK)
    y = x.new_empty(x.shape, dtype=written(x))
    final = x.new_empty(n_seq, *dA.shape, dtype=torch.float32)
    marks = x.new_empty(_marks(x, dA, save), dtype=torch.float32)
    marks[used:] = 0
    shape, sizes, tasks = _tiling(x, dA, n_seq, 4)
    run(
        cpu_kernels.forward,
        tasks,
        x.numel() * dA[0].numel() // _LIGHT,
        shape,
        True if dA.shape[2] == 2 else None,
        sizes,
        table,
        *tokens(x),
        *_decays(dA),
        *(numbers(t, 0) for t in (B, C)),
        numbers(D, channels),
        numbers(initial, 0),
        *(flat(t) for t in (y, final, marks)),
    )
    return y.to(x.dtype), final, marks


_forward = torch.library.custom_op("plait::diagonal_ssm_cpu", _compute, mutates_args=(), device_types="cpu")


@_forward.register_fake
def _(x, dA, B, C, D, initial, cu_seqlens, save):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape),
        x.new_empty(count_sequences(x, cu_seqlens), *dA.shape, dtype=torch.float32),
        x.new_empty(_marks(x, dA, save), dtype=torch.float32),
    )


@torch.library.custom_op("plait::diagonal_ssm_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    marks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dA, B, C, D and the initial state; empty for what was not given."""
    n_seq, (_, length, channels) = count_sequences(x, cu_seqlens), x.shape
    table, used = segments(n_seq, length, cu_seqlens, cpu_kernels.BLOCK)
    if used > marks.shape[0]:
        raise RuntimeError("diagonal_ssm: backward needs the states that forward was told not to keep")
    shape, sizes, tasks = _tiling(x, dA, n_seq, 4 // dA.shape[2])  # more would not stay in registers
    parts = sizes[-1]
    decay, rest = _decays(dA)
    dx = x.new_empty(x.shape, dtype=written(x))
    dinitial = x.new_empty(n_seq, *dA.shape, dtype=torch.float32)
    dp, db, dc = (x.new_empty(parts, *dA.shape, dtype=torch.float32) for _ in "pbc")
    dskip = x.new_empty(parts, channels, dtype=torch.float32)
    run(
        cpu_kernels.backward,
        tasks,
        3 * x.numel() * dA[0].numel() // _LIGHT,
        shape,
        True if dA.shape[2] == 2 else None,
        sizes,
        table,
        *tokens(x, dy),
        decay,
        rest,
        *(numbers(t, 0) for t in (B, C)),
        numbers(D, channels),
        *(numbers(t, 0) for t in (initial, dfinal)),
        flat(marks),
        *(flat(t) for t in (dx, dinitial, dp, db, dc, dskip)),
    )
    p, to_p = torch.from_numpy(decay).view(dA.shape), dp.sum(0)
    if dA.shape[2] == 2:  # conj(p) dp
        (a, b), (c, d) = p.unbind(2), to_p.unbind(2)
        to_p = torch.stack([a * c + b * d, a * d - b * c], 2)
    else:
        to_p = p * to_p
    return (
        dx.to(x.dtype),
        to_p.to(dA.dtype),
        db.sum(0).to(B.dtype),
        dc.sum(0).to(C.dtype),
        x.new_empty(0) if D is None else dskip.sum(0).to(D.dtype),
        x.new_empty(0) if initial is None else dinitial.to(initial.dtype),
    )


@_backward.register_fake
def _(dy, dfinal, x, dA, B, C, D, initial, *_):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dA, B, C, D, initial))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:7], output[2])


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, marks = ctx.saved_tensors
    dy = torch.zeros_like(given[0]) if dy is None else dy
    grads = _backward(dy, dfinal, *given, marks)
    return (*(None if t is None else grad for t, grad in zip(given, grads, strict=False)), None, None)


_forward.register_autograd(_gradients, setup_context=_remember)


def _tiling(x: Tensor, dA: Tensor, n_seq: int, rows: int) -> tuple[Any, tuple[int, ...], int]:
    """The type of a tile of at most so many states, the sizes for the kernels, and how many tasks there are."""
    (_, length, channels), (states, pair) = x.shape, dA.shape[1:]
    blocks = -(-channels // LANES)
    parts = max(1, min(n_seq, _TASKS // max(blocks, 1)))
    sizes = (length, channels, states, _deep(states), pair, blocks, parts)
    return ((0,),) * min(rows, _deep(states)), sizes, blocks * parts


def _deep(states: int) -> int:
    """N in whole tiles: 1, 2, or a multiple of 4."""
    return states if states < 3 else -(-states // 4) * 4


def _marks(x: Tensor, dA: Tensor, save: bool) -> tuple[int, ...]:
    """The shape of the states to keep: a bound that does not depend on where the documents lie."""
    count = x.shape[0] * (x.shape[1] // cpu_kernels.BLOCK) if save else 0
    return count, -(-x.shape[2] // LANES), dA.shape[2], _deep(dA.shape[1]), LANES


def _decays(dA: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """exp(dA) in float32, and what that rounds off, in proportion to it."""
    size = torch.exp(dA[..., :1].double())
    exact = size
    if dA.shape[2] == 2:
        angle = dA[..., 1:].double()
        exact = torch.cat([size * torch.cos(angle), size * torch.sin(angle)], 2)
    rounded = exact.float()
    missing = exact - rounded
    if dA.shape[2] == 2:  # times conj(p) / |p|^2
        (a, b), (c, d) = exact.unbind(2), missing.unbind(2)
        missing = torch.stack([a * c + b * d, a * d - b * c], 2)
        size = size * size
    rest = torch.where(size > 1e-30, missing / size, 0)
    return flat(rounded.contiguous()), flat(rest.float().contiguous())
