"""Mamba-2's op on GPUs: the Triton kernels of `gpu_forward.py` and `gpu_backward.py` as torch ops.

The forward pass is three launches, backward ten; six more in all where sequences are cut into pieces. Nothing but the
inputs is kept for backward. The order of every sum is fixed: two runs are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops.ssd import gpu_backward, gpu_forward
from plait.ops.triton_support import (
    INTERPRET,
    KernelOp,
    cdiv,
    multiprocessors,
    on_device,
    power_of_2,
    precision,
    shared_memory,
)

LARGEST_STATE = 256
"""The largest N: a tile holds all of it."""
SHORTEST = 1 if INTERPRET.value else 8
"""Blocks of the shortest piece."""
SHARED = 2 if INTERPRET.value else 4
"""From so many heads a group on, q k^T is worth computing once for all of them."""


@dataclass(frozen=True)
class Tuning:
    """How a kernel is compiled, and how many of its programs a multiprocessor then holds."""

    warps: int = 4
    stages: int = 2
    registers: int | None = None
    """at most so many a thread"""
    programs: int = 2

    def options(self) -> dict[str, Any]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True)
class Config:
    """Tile sizes, and the tuning of each kernel."""

    rows: int
    """Q, rows a block"""
    columns: int
    """columns of a head's state that a program holds, at most"""
    forward: Tuning = Tuning()
    state: Tuning = Tuning(registers=168, programs=3)
    output: Tuning = Tuning(registers=168, programs=3)
    pair: Tuning = Tuning(registers=168, programs=3)
    query: Tuning = Tuning()
    key: Tuning = Tuning(registers=168, programs=3)
    value: Tuning = Tuning(registers=168, programs=3)


KERNELS = ("forward", "state", "output", "pair", "query", "key", "value")
ONE_STAGE = dict.fromkeys(KERNELS, Tuning(stages=1))
# (bytes of an element, the largest padded N, KiB of shared memory that it needs, tiles): the first that fits is taken.
CONFIGS: tuple[tuple[int, int, int, Config], ...] = (
    (2, 128, 160, Config(64, 64)),
    (2, 128, 96, Config(64, 32)),
    (2, 256, 160, Config(64, 32, forward=Tuning(programs=1), pair=Tuning(), key=Tuning())),
    (2, 256, 96, Config(32, 32, **ONE_STAGE)),
    (4, 128, 96, Config(16, 32, **ONE_STAGE)),
    (4, 256, 96, Config(16, 16, **ONE_STAGE)),
)
# The interpreter's: as many blocks, slices and pieces as possible in little time.
INTERPRETED = Config(16, 16)


@cache
def choose_config(dtype: torch.dtype, state: int, device: torch.device) -> Config:
    """The tiles for a dtype and a (padded) state size on a device."""
    if INTERPRET.value:
        return INTERPRETED
    for size, largest, needed, config in CONFIGS:
        if size == dtype.itemsize and state <= largest and needed * 1024 <= shared_memory(device):
            return config
    raise BackendError(f"ssd: backend 'gpu' needs {CONFIGS[-1][2]} KiB of shared memory, {device} has less")


class Pieces(NamedTuple):
    """How the rows are cut."""

    blocks: int
    """blocks a piece"""
    pieces: int
    """pieces a row"""


class Launch:
    """The sizes and strides of one call, and how its kernels are launched."""

    def __init__(
        self,
        x: Tensor,
        k: Tensor,
        q: Tensor,
        cu_seqlens: Tensor | None,
        n_seq: int,
        *,
        gated: bool = False,
        config: Config | None = None,
    ) -> None:
        # x (S, T, R, H, P); k, q (S, T, R, G, N)
        self.x, self.k, self.q, self.cu, self.n_seq, self.gated = x, k, q, cu_seqlens, n_seq, gated
        self.rows, self.length, self.rank, self.heads, self.width = x.shape
        self.groups, self.state = k.shape[3:]
        self.exact = x.dtype == torch.float32
        self.vectors = 2 + gated + self.exact
        self.config = c = config or choose_config(x.dtype, power_of_2(self.state, 16), x.device)
        self.block = c.rows // self.rank
        if self.block == 0:
            raise BackendError(f"ssd: backend 'gpu' takes a rank of at most {c.rows}, given {self.rank}")
        self.slice = min(c.columns, power_of_2(self.width, 16))
        self.slices = cdiv(self.width, self.slice)
        self.packed = cu_seqlens is not None
        self.table = x
        if cu_seqlens is None:
            self.steps = cdiv(self.length, self.block)
            self.blocks = self.rows * self.steps
        else:
            self.steps = self.blocks = self.length // self.block + n_seq
            self.table = x.new_empty(self.blocks, 4, dtype=torch.int32)
            gpu_forward.table_kernel[(cdiv(self.blocks, 64),)](
                cu_seqlens, self.table, n_seq, self.blocks, self.block, BLOCK=64, SEQUENCES=64
            )
        self.full = not self.packed and self.length % self.block == 0 and self.block * self.rank == c.rows
        self.columns = self.heads * self.slices
        self.vec = x.new_empty(self.blocks, self.heads, self.vectors, self.block, dtype=torch.float32)
        self.tiles: dict[str, Any] = {
            "Q": c.rows,
            "T": self.block,
            "R": self.rank,
            "P": self.width,
            "N": self.state,
            "PB": self.slice,
            "NB": power_of_2(self.state, 16),
            "V": self.vectors,
            "VARLEN": self.packed,
            "FULL": self.full,
            "EXACT": self.exact,
            "PRECISION": precision(x),
        }

    def cut(self, tuning: Tuning) -> Pieces:
        """Cut the rows where that gives more programs, but not more than the device holds at once."""
        have = max(self.rows * self.columns, 1)
        pieces = max(tuning.programs * multiprocessors(self.x.device) // have, 1)
        size = max(cdiv(self.steps, pieces), SHORTEST)
        return Pieces(size, max(cdiv(self.steps, size), 1))

    def shares(self, programs: int) -> int:
        """Into how many shares the columns of a group fall to make at least so many programs a block of rows."""
        per_group = self.columns // self.groups
        wanted = cdiv(programs, max(self.blocks * self.groups, 1))
        return next(n for n in range(min(wanted, per_group), per_group + 1) if per_group % n == 0)

    def sizes(self) -> tuple[int, ...]:
        """L, K, BLOCKS, H, M, G, heads a group."""
        return (
            self.length,
            self.steps,
            self.blocks,
            self.heads,
            self.slices,
            self.groups,
            self.heads // self.groups,
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """New memory on x's device."""
        return self.x.new_empty(shape, dtype=dtype)

    def walk(
        self,
        x: Tensor,
        k: Tensor,
        pieces: Pieces,
        initial: Tensor | None,
        entry: Tensor | None,
        *,
        out: Tensor | None = None,
        final: Tensor | None = None,
        decay: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Launch `state_kernel`; `decay` given: only what each piece adds, into `final`."""
        gpu_forward.state_kernel[(self.rows * pieces.pieces * self.columns,)](
            x,
            k,
            self.vec,
            self.table,
            _or(initial, x),
            _or(entry, x),
            _or(out, x),
            _or(final, x),
            _or(decay, x),
            self.length,
            self.steps,
            *pieces,
            self.heads,
            self.slices,
            self.heads // self.groups,
            *x.stride()[:4],
            *k.stride()[:4],
            REVERSE=reverse,
            INITIAL=initial is not None,
            ENTRY=entry is not None,
            STORE=out is not None,
            FINAL=final is not None and decay is None,
            PIECE_FINAL=decay is not None,
            **self.tiles,
            **self.config.state.options(),
        )

    def entries(
        self, x: Tensor, k: Tensor, pieces: Pieces, initial: Tensor | None, reverse: bool
    ) -> Tensor | None:
        """What enters each piece (pieces, H, P, N), from what the pieces before add; None for one piece a row."""
        if pieces.pieces == 1:
            return None
        final = self.empty(self.rows * pieces.pieces, self.heads, self.width, self.state)
        decay = self.empty(self.rows * pieces.pieces, self.heads)
        self.walk(x, k, pieces, initial, None, final=final, decay=decay, reverse=reverse)
        entry = torch.empty_like(final)
        size = self.width * self.state
        gpu_forward.carry_kernel[(cdiv(size, 1024), self.rows * self.heads)](
            final, decay, entry, self.heads, pieces.pieces, size, BLOCK=1024, REVERSE=reverse
        )
        return entry

    def states(
        self, x: Tensor, k: Tensor, initial: Tensor | None, final: Tensor | None, reverse: bool
    ) -> Tensor:
        """The state that enters each block (`reverse`: the gradient of the one that leaves it); `final` is filled."""
        pieces = self.cut(self.config.state)
        out = self.empty(self.blocks, self.columns, self.tiles["NB"], self.slice, dtype=x.dtype)
        entry = self.entries(x, k, pieces, initial, reverse)
        self.walk(x, k, pieces, initial, entry, out=out, final=final, reverse=reverse)
        if final is not None and self.packed:
            size = final[0].numel()
            gpu_forward.empty_kernel[(self.n_seq,)](
                self.cu, _or(initial, final), final, size, GIVEN=initial is not None, BLOCK=1024
            )
        return out

    def forward(self, D: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (S, T, R, H, P) and the final states."""
        x, k, q = self.x, self.k, self.q
        y = self.empty(*x.shape, dtype=x.dtype)
        final = self.empty(self.n_seq, self.heads, self.width, self.state)
        options = {"GATED": self.gated, "SKIP": 0 if D is None else D.dim(), **self.tiles}
        strides = (*x.stride()[:4], *k.stride()[:4], *q.stride()[:4])
        if self.columns // self.groups >= SHARED:
            states = self.states(x, k, initial, final, reverse=False)
            shares = self.shares(8 * multiprocessors(x.device))
            gpu_forward.output_kernel[(self.blocks * self.groups * shares,)](
                x,
                k,
                q,
                states,
                self.vec,
                _or(D, x),
                self.table,
                y,
                *self.sizes(),
                *strides,
                SHARE=self.columns // self.groups // shares,
                **options,
                **self.config.output.options(),
            )
            return y, final
        pieces = self.cut(self.config.forward)
        entry = self.entries(x, k, pieces, initial, reverse=False)
        gpu_forward.forward_kernel[(self.rows * pieces.pieces * self.columns,)](
            x,
            k,
            q,
            self.vec,
            _or(D, x),
            self.table,
            _or(initial, x),
            _or(entry, x),
            y,
            final,
            self.length,
            self.steps,
            *pieces,
            self.heads,
            self.slices,
            self.heads // self.groups,
            *strides,
            INITIAL=initial is not None,
            ENTRY=entry is not None,
            **options,
            **self.config.forward.options(),
        )
        if self.packed:
            size = final[0].numel()
            gpu_forward.empty_kernel[(self.n_seq,)](
                self.cu, _or(initial, final), final, size, GIVEN=initial is not None, BLOCK=1024
            )
        return y, final

    def backward(
        self, dy: Tensor, dfinal: Tensor | None, D: Tensor | None, initial: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """The gradients of x, k, q and the initial state; `rows` and `inner` for the narrow ones."""
        x, k, q = self.x, self.k, self.q
        states = self.states(x, k, initial, None, reverse=False)
        dinitial = None if initial is None else self.empty(*initial.shape)
        gradients = self.states(dy, q, dfinal, dinitial, reverse=True)

        per_group = self.columns // self.groups
        shares = self.shares(6 * multiprocessors(x.device))
        shape = (self.rows, self.length, self.rank, self.groups, self.state)
        rows = self.empty(self.blocks, self.columns, gpu_backward.ROWS, self.config.rows)
        inner = self.empty(self.blocks, self.columns, self.slice)
        dx = self.empty(*x.shape, dtype=x.dtype)
        through_q, through_k = self.empty(2, shares, *shape)
        wide = self.empty(2, shares, *shape, dtype=x.dtype if shares == 1 else torch.float32)
        x_strides, k_strides, q_strides, dy_strides = (t.stride()[:4] for t in (x, k, q, dy))
        grid = (self.blocks * self.groups * shares,)
        share = {"SHARE": per_group // shares, **self.tiles}
        gpu_backward.pair_kernel[grid](
            x,
            k,
            q,
            dy,
            self.vec,
            self.table,
            rows,
            through_q,
            through_k,
            *self.sizes(),
            *x_strides,
            *k_strides,
            *q_strides,
            *dy_strides,
            GATED=self.gated,
            **share,
            **self.config.pair.options(),
        )
        for query, (t, other, state, through, tuning) in enumerate(
            (
                (x, k, gradients, through_k, self.config.key),
                (dy, q, states, through_q, self.config.query),
            )
        ):
            gpu_backward.state_rows_kernel[grid](
                t,
                other,
                state,
                gradients,
                self.vec,
                self.table,
                rows,
                inner,
                through,
                wide[query],
                *self.sizes(),
                *t.stride()[:4],
                *other.stride()[:4],
                QUERY=bool(query),
                **share,
                **tuning.options(),
            )
        value_shares = self.shares(12 * multiprocessors(x.device))
        gpu_backward.value_kernel[(self.blocks * self.groups * value_shares,)](
            x,
            k,
            q,
            dy,
            gradients,
            self.vec,
            _or(D, x),
            self.table,
            rows,
            dx,
            *self.sizes(),
            *x_strides,
            *k_strides,
            *q_strides,
            *dy_strides,
            GATED=self.gated,
            SKIP=0 if D is None else D.dim(),
            **{**share, "SHARE": per_group // value_shares},
            **self.config.value.options(),
        )
        if shares == 1:
            dk, dq = wide[:, 0]
        else:
            total = self.empty(2, *shape, dtype=x.dtype)
            size = total[0].numel()
            gpu_backward.shares_kernel[(cdiv(size, 1024), 2)](wide, total, size, shares, BLOCK=1024)
            dk, dq = total
        return dx, dk, dq, dinitial, rows, inner

    def skip_gradient(self, dy: Tensor) -> Tensor:
        """The gradient of D (H, P)."""
        tokens = 128
        blocks = self.rows * cdiv(self.length, tokens)
        sums = self.empty(blocks, self.heads, self.width)
        gpu_backward.skip_kernel[(blocks, self.heads)](
            self.x,
            dy,
            sums,
            self.length,
            cdiv(self.length, tokens),
            self.heads,
            *self.x.stride()[:4],
            *dy.stride()[:4],
            R=self.rank,
            P=self.width,
            PB=power_of_2(self.width),
            T=tokens,
        )
        return sums.sum(0)


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
    """Mamba-2's recurrence; shapes as in `plait.ops.ssd.ssd`. x is float32, bfloat16 or float16, and N at most 256.

    Products are of x's dtype (float32: full digits), states and decays float32. B and C are taken in x's dtype.
    """
    _check(x, B)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    y, final = SSD(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high)
    return y, final


def _check(x: Tensor, B: Tensor) -> None:
    if B.shape[-1] > LARGEST_STATE:
        raise BackendError(
            f"ssd: backend 'gpu' takes a state size of at most {LARGEST_STATE}, given {B.shape[-1]}; "
            "use backend 'portable'"
        )


def _start(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    bias: Tensor | None,
    cu: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Launch:
    """The launch for Mamba-2, its steps computed."""
    x, B, C = (_rows(t, x.dtype).unsqueeze(2) for t in (x, B, C))
    launch = Launch(x, B, C, cu, x.shape[0] if cu is None else cu.shape[0] - 1)
    heads = min(16, power_of_2(launch.heads))
    gpu_forward.steps_kernel[(launch.blocks, cdiv(launch.heads, heads))](
        dt,
        _or(bias, dt),
        A,
        launch.vec,
        launch.table,
        launch.length,
        launch.steps,
        launch.heads,
        *dt.stride(),
        low,
        high,
        T=launch.block,
        HEADS=heads,
        SOFTPLUS=softplus,
        BIAS=bias is not None,
        VARLEN=launch.packed,
        EXACT=launch.exact,
    )
    return launch


def _forward(
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
) -> tuple[Tensor, Tensor]:
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format), _initial(x, B, initial, n_seq)
    with on_device(x):
        launch = _start(x, dt, A, B, C, dt_bias, cu_seqlens, softplus, low, high)
        y, final = launch.forward(_dense(D), _dense(initial))
    return y.squeeze(2), final


def _backward(
    dy: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state; empty for what was not given."""
    none = x.new_empty(0)
    dinitial: Tensor | None
    if x.numel() == 0:
        of = (x, dt, A, B, C, D, dt_bias)
        dinitial = none if initial is None else _initial(x, B, dfinal, initial.shape[0]).to(initial.dtype)
        return (*(none if t is None else torch.zeros_like(t) for t in of), dinitial)  # type: ignore[return-value]
    dy = torch.zeros_like(x) if dy is None else dy
    with on_device(x):
        launch = _start(x, dt, A, B, C, dt_bias, cu_seqlens, softplus, low, high)
        dy = _rows(dy, x.dtype).unsqueeze(2)
        dx, dB, dC, dinitial, rows, inner = launch.backward(dy, _dense(dfinal), _dense(D), _dense(initial))
        ddt = torch.empty_like(dt, memory_format=torch.contiguous_format)
        sums = launch.empty(3, launch.blocks, launch.heads)
        heads = min(16, power_of_2(launch.heads))
        gpu_backward.steps_gradient_kernel[(launch.blocks, cdiv(launch.heads, heads))](
            rows,
            inner,
            launch.vec,
            dt,
            _or(dt_bias, dt),
            A,
            launch.table,
            ddt,
            sums,
            launch.length,
            launch.steps,
            launch.blocks,
            launch.heads,
            launch.slices,
            *dt.stride(),
            low,
            high,
            Q=launch.block,
            PB=launch.slice,
            V=launch.vectors,
            HEADS=heads,
            SOFTPLUS=softplus,
            BIAS=dt_bias is not None,
            VARLEN=launch.packed,
            SKIP=0 if D is None else D.dim(),
            EXACT=launch.exact,
        )
        dA, dbias, dD = sums.sum(1)
        if D is not None and D.dim() == 2:
            dD = launch.skip_gradient(dy)
    return (
        dx.squeeze(2),
        ddt,
        dA.to(A.dtype, copy=True),
        dB.squeeze(2).to(B.dtype),
        dC.squeeze(2).to(C.dtype),
        none if D is None else dD.to(D.dtype, copy=True),
        none if dt_bias is None else dbias.to(dt_bias.dtype, copy=True),
        none if dinitial is None or initial is None else dinitial.to(initial.dtype),
    )


def _fake(x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, *_):  # type: ignore[no-untyped-def]
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(n_seq, *x.shape[2:], B.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), final


def _fake_backward(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial, *_):  # type: ignore[no-untyped-def]
    of = (x, dt, A, B, C, D, dt_bias, initial)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in of)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    grads = backward(dy, dfinal, *given, *ctx.options)
    of = (None if t is None else grad for t, grad in zip(given, grads, strict=False))
    return (*of, *(None for _ in range(4)))


SSD = KernelOp(
    "ssd_gpu", _forward, _backward, fake=_fake, fake_backward=_fake_backward, save=_save, gradients=_gradients
)


def _initial(x: Tensor, B: Tensor, given: Tensor | None, n_seq: int) -> Tensor:
    """A float32 copy of the given states, or zeros."""
    if given is not None:
        return given.to(torch.float32, copy=True)
    return x.new_zeros(n_seq, *x.shape[2:], B.shape[3], dtype=torch.float32)


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`, its last dimension without gaps."""
    t = t.to(dtype)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    """What stands for a pointer that a kernel does not use."""
    return other if t is None else t
