"""Mamba-2's and Mamba-3's ops on CPUs: the Numba kernels of `cpu_kernels.py` as torch custom ops.

Which thread computes which task changes no number: results are equal bit for bit for any number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.ops.numba_run import direct, flat, numbers, run, written
from plait.ops.numba_support import AVX512
from plait.ops.segments import segments
from plait.ops.ssd import cpu_backward, cpu_kernels, portable, reduction
from plait.ops.ssd.cpu_kernels import ROWS, SLABS
from plait.ops.ssd.resume import States
from plait.ops.tiles import LANES

_LIGHT = 16
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
    return reduction.ssd(
        _engine(x.shape[0], cu_seqlens),
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_state,
    )


def trapezoidal_ssd(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    lam: Tensor,
    *,
    rank_in: Tensor | None,
    D: Tensor | None,
    initial_state: States | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
) -> tuple[Tensor, States]:
    """Mamba-3's recurrence in float32; shapes as in `plait.ops.ssd.trapezoidal_ssd`. v may not be float64."""
    if k.shape[2] > ROWS:  # a token's ranks must fit a slab
        return portable.trapezoidal_ssd(
            v,
            k,
            q,
            log_decay,
            dt,
            lam,
            rank_in=rank_in,
            D=D,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            max_len=max_len,
        )
    return reduction.trapezoidal_ssd(
        _engine(v.shape[0], cu_seqlens),
        v,
        k,
        q,
        log_decay,
        dt,
        lam,
        rank_in=rank_in,
        D=D,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _engine(n_rows: int, cu_seqlens: Tensor | None) -> reduction.Scan:
    """The kernels on n_rows dense sequences, or on the packed ones that cu_seqlens bounds."""
    n_seq = n_rows if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def scan(
        v: Tensor,
        k: Tensor,
        q: Tensor,
        a: Tensor,
        w: Tensor,
        d: Tensor | None,
        skip: Tensor | None,
        ranks: Tensor | None,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        given = (v, k, q, a, w, d, skip, ranks, initial)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        y, final, _ = direct(_forward, _compute, *given, cu_seqlens, n_seq, save)
        return y, final

    return scan


def _compute(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    a: Tensor,
    w: Tensor,
    d: Tensor | None,
    skip: Tensor | None,
    ranks: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    n_seq: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reduction.Scan`: y, the final states, and for backward the states entering blocks (blocks, H, padded)."""
    (tokens, heads, width), (rank, groups, size) = v.shape, k.shape[1:]
    y = v.new_empty(tokens, rank, heads, width, dtype=written(v))
    final = v.new_empty(n_seq, heads, width, size, dtype=torch.float32)
    marks = v.new_empty(
        _saved(tokens, n_seq, rank, cu_seqlens, save), heads, _area(width, size), dtype=torch.float32
    )
    table, used, length = _segments(tokens, n_seq, rank, cu_seqlens)
    marks[used:] = 0
    share, parts = _share(n_seq, heads, groups)
    weights = flat(w.float().contiguous())
    run(
        cpu_kernels.forward,
        n_seq * parts,
        tokens * rank * heads * width * size // _LIGHT,
        *_shapes(size),
        (length, heads, width, groups, size, rank, share, parts),
        table,
        *_values(v),
        *_keys(k, q),
        flat(a.double().exp().contiguous()),
        weights,
        weights if d is None else flat(d.float().contiguous()),
        _skip(v, skip),
        _ranks(v, rank, ranks),
        numbers(initial),
        *(flat(t) for t in (y, final, marks)),
    )
    return y.to(v.dtype), final, marks


_forward = torch.library.custom_op("plait::ssd_cpu", _compute, mutates_args=(), device_types="cpu")


@_forward.register_fake
def _(v, k, q, a, w, d, skip, ranks, initial, cu_seqlens, n_seq, save):  # type: ignore[no-untyped-def]
    (tokens, heads, width), (rank, _, size) = v.shape, k.shape[1:]
    saved = _saved(tokens, n_seq, rank, cu_seqlens, save)
    return (
        v.new_empty(tokens, rank, heads, width),
        v.new_empty(n_seq, heads, width, size, dtype=torch.float32),
        v.new_empty(saved, heads, _area(width, size), dtype=torch.float32),
    )


@torch.library.custom_op("plait::ssd_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    v: Tensor,
    k: Tensor,
    q: Tensor,
    a: Tensor,
    w: Tensor,
    d: Tensor | None,
    skip: Tensor | None,
    ranks: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    n_seq: int,
    marks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first nine inputs of `_forward`; empty for what was not given."""
    (tokens, heads, width), (rank, groups, size) = v.shape, k.shape[1:]
    table, used, length = _segments(tokens, n_seq, rank, cu_seqlens)
    if used > marks.shape[0]:
        raise RuntimeError("ssd: backward needs the states that forward was told not to keep")
    share, parts = _share(n_seq, heads, groups)
    dv = v.new_empty(v.shape, dtype=written(v))
    dk, dq = (v.new_empty(parts // groups, *k.shape, dtype=torch.float32) for _ in "kq")
    da, dw, dd = (v.new_empty(tokens, heads, dtype=torch.float32) for _ in "awd")
    dinitial = v.new_empty(n_seq, heads, width, size, dtype=torch.float32)
    sums = np.empty((n_seq, heads, 1 + (0 if ranks is None and rank == 1 else rank), width))
    weights = flat(w.float().contiguous())
    run(
        cpu_backward.backward,
        n_seq * parts,
        3 * tokens * rank * heads * width * size // _LIGHT,
        *_shapes(size),
        (length, heads, width, groups, size, rank, share, parts),
        table,
        *_values(v),
        *_keys(dy.to(written(v))),
        *_keys(k, q),
        flat(a.double().exp().contiguous()),
        weights,
        weights if d is None else flat(d.float().contiguous()),
        _skip(v, skip),
        _ranks(v, rank, ranks),
        *(numbers(t) for t in (initial, dfinal)),
        flat(marks),
        *(flat(t) for t in (dv, dk, dq, da, dw, dd, dinitial)),
        sums.reshape(-1),
    )
    total = torch.from_numpy(sums.sum(0))
    dskip = total[:, 0] if skip is not None and skip.dim() == 2 else total[:, 0].sum(1)
    return (
        dv.to(v.dtype),
        _added(dk, k.dtype),
        _added(dq, q.dtype),
        da.to(a.dtype),
        (dw if d is not None else dw.add_(dd)).to(w.dtype),
        v.new_empty(0) if d is None else dd.to(d.dtype),
        v.new_empty(0) if skip is None else dskip.to(skip.dtype, copy=True).contiguous(),
        v.new_empty(0) if ranks is None else total[:, 1:].to(ranks.dtype, copy=True).contiguous(),
        v.new_empty(0) if initial is None else dinitial.to(initial.dtype),
    )


@_backward.register_fake
def _(dy, dfinal, v, k, q, a, w, d, skip, ranks, initial, *_):  # type: ignore[no-untyped-def]
    of = [v, k, q, a, w, d, skip, ranks, initial]
    return tuple(v.new_empty(0) if t is None else t.new_empty(t.shape) for t in of)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:10], output[2])
    ctx.n_seq = inputs[10]


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, marks = ctx.saved_tensors
    if dy is None:
        v, k = given[:2]
        dy = v.new_zeros(v.shape[0], k.shape[1], *v.shape[1:])
    grads = _backward(dy, dfinal, *given, ctx.n_seq, marks)
    return (*(None if t is None else grad for t, grad in zip(given, grads, strict=False)), None, None, None)


_forward.register_autograd(_gradients, setup_context=_remember)


def _block(rank: int) -> int:
    """Tokens a block: one state a block is kept for backward."""
    return SLABS * (ROWS // rank)


def _segments(tokens: int, n_seq: int, rank: int, cu_seqlens: Tensor | None) -> tuple[Any, int, int]:
    """Where the sequences lie, how many states are saved, and the tokens of a row."""
    length = tokens // max(n_seq, 1) if cu_seqlens is None else tokens
    return *segments(n_seq, length, cu_seqlens, _block(rank)), length


def _saved(tokens: int, n_seq: int, rank: int, cu_seqlens: Tensor | None, save: bool) -> int:
    """A bound of the states to keep that does not depend on where the documents lie."""
    if not save:
        return 0
    return (
        tokens // _block(rank)
        if cu_seqlens is not None
        else n_seq * (tokens // max(n_seq, 1) // _block(rank))
    )


@cache
def _tiles() -> tuple[tuple[int, int], ...]:
    """The tiles (rows, vectors of 16 lanes) that fit the registers, with some to spare; the last is tall."""
    if AVX512:
        return (4, 4), (8, 2), (16, 1)
    return (4, 1), (4, 1)


def _shapes(size: int) -> tuple[Any, Any]:
    """The types of the tile that covers N with the least work (pads, and some a tile), and of the tall one."""
    rows, vectors = min(_tiles(), key=lambda tile: _work(size, tile[1]))
    return ((0,) * vectors,) * rows, ((0,),) * _tiles()[-1][0]


def _work(size: int, vectors: int) -> int:
    return -(-size // (vectors * LANES)) * (vectors * LANES + LANES)


def _area(width: int, size: int) -> int:
    """Elements of one head's padded state."""
    lanes = LANES * len(_shapes(size)[0][0])
    return -(-width // ROWS) * ROWS * (-(-size // lanes) * lanes)


def _share(n_seq: int, heads: int, groups: int) -> tuple[int, int]:
    """Heads a task, and tasks a sequence. More heads share the products of q and k, fewer give more tasks."""
    per_group = heads // groups
    share = min(8, max(1, n_seq * heads // 6), per_group)
    return share, groups * -(-per_group // share)


def _values(v: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """v (n, H, P) as a flat array and its first two strides."""
    return _flat(v if v.dtype == torch.bfloat16 else v.float(), 2)


def _keys(*tensors: Tensor) -> list[Any]:
    """Each tensor (n, R, G, N) as a flat array and its first three strides: all bfloat16 or all float32."""
    if not all(t.dtype == torch.bfloat16 for t in tensors):
        tensors = tuple(t.float() for t in tensors)
    return [item for t in tensors for item in _flat(t, 3)]


def _flat(t: Tensor, strides: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """What t spans, and its strides; copied if its channels or states do not lie together."""
    if t.numel() and t.stride(-1) != 1:
        t = t.contiguous()
    return flat(t), t.stride()[:strides]


def _skip(v: Tensor, skip: Tensor | None) -> np.ndarray:
    """D of every channel (H * P,); zeros for none."""
    shape = v.shape[1:]
    if skip is None:
        return np.zeros(shape.numel(), np.float32)
    return numbers(skip if skip.dim() == 2 else skip.unsqueeze(1).expand(shape))


def _ranks(v: Tensor, rank: int, ranks: Tensor | None) -> np.ndarray:
    """m (H, R, P); ones for none, and nothing for one rank without it."""
    if ranks is None and rank > 1:
        return np.ones(rank * v.shape[1:].numel(), np.float32)
    return numbers(ranks)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over dim 0 in order, in `dtype`."""
    total = parts[0]
    for i, part in enumerate(parts[1:]):
        total = total + part if i == 0 else total.add_(part)
    return total.to(dtype)
