"""How the kernels of `gpu_forward.py` and `gpu_backward.py` are tiled and launched, for Mamba-2 and Mamba-3 alike.

A `Plan` is made once for a kind of call (shapes, strides, dtypes, alignment) and kept: its launches go straight to
Triton's compiled kernels, since looking those up costs the host many times what a launch does. Letters: gpu_forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops.ssd import gpu_backward, gpu_forward
from plait.ops.triton_support import INTERPRET, cdiv, multiprocessors, power_of_2, precision, shared_memory

SHORTEST = 1 if INTERPRET.value else 8
"""Blocks of the shortest piece."""
SHARE_PROGRAMS, VALUE_PROGRAMS = 6, 12
"""Programs a multiprocessor into which the heads of groups are shared out, at least: where sums over them have to be
added up afterwards, and where not."""
_PLANS_KEPT = 1024


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
    """PB, columns of a head's state that a program holds"""
    states: int
    """NB is at least so much"""
    forward: Tuning = Tuning()
    state: Tuning = Tuning(stages=3)
    pair: Tuning = Tuning(registers=168, programs=3)
    query: Tuning = Tuning()
    key: Tuning = Tuning(stages=3)
    value: Tuning = Tuning(stages=3)
    own: Tuning = Tuning(stages=1)
    narrow: Tuning = Tuning(stages=1)


ONE_STAGE = dict.fromkeys(("forward", "state", "pair", "query", "key", "value", "own"), Tuning(stages=1))
# (bytes of an element, the largest padded N, KiB of shared memory that it needs, tiles): the first that fits is taken.
CONFIGS: tuple[tuple[int, int, int, Config], ...] = (
    (2, 128, 132, Config(64, 64, 32)),
    (2, 128, 96, Config(64, 64, 32, key=Tuning(), state=Tuning())),
    (2, 256, 96, Config(32, 32, 32, **ONE_STAGE)),
    (4, 128, 96, Config(16, 32, 16, **ONE_STAGE)),
    (4, 256, 96, Config(16, 16, 16, **ONE_STAGE)),
)
# The interpreter's: many blocks and slices of little work.
INTERPRETED = Config(16, 16, 16)


@cache
def choose_config(dtype: torch.dtype, state: int, device: torch.device) -> Config:
    """The tiles for a dtype and a state size on a device."""
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


class Plan:
    """The sizes of one kind of call, and its launches. x (S, T, R, H, P); k, q (S, T, R, G, N)."""

    def __init__(self, x: Tensor, k: Tensor, n_seq: int, *, packed: bool, gated: bool) -> None:
        self.rows, self.length, self.rank, self.heads, self.width = x.shape
        self.groups, self.state = k.shape[3:]
        self.n_seq, self.packed, self.gated = n_seq, packed, gated
        self.device, self.dtype = x.device, x.dtype
        self.config = config = choose_config(x.dtype, self.state, x.device)
        self.block = config.rows // self.rank
        if self.block == 0:
            raise BackendError(f"ssd: backend 'gpu' takes a rank of at most {config.rows}, given {self.rank}")
        self.steps = self.length // self.block + n_seq if packed else cdiv(self.length, self.block)
        self.blocks = self.rows * self.steps
        self.slice = config.columns
        self.slices = cdiv(self.width, self.slice)
        self.columns = self.heads * self.slices
        self.padded_state = power_of_2(self.state, config.states)
        exact = x.dtype == torch.float32
        self.vectors = 2 + gated + exact
        whole = self.length % self.block == 0 and self.block * self.rank == config.rows
        self.sizes: dict[str, Any] = {
            "L": self.length,
            "K": self.steps,
            "BLOCKS": self.blocks,
            "H": self.heads,
            "M": self.slices,
            "G": self.groups,
            "HEADS_PER_GROUP": self.heads // self.groups,
            "Q": config.rows,
            "T": self.block,
            "TOKENS": power_of_2(self.block),
            "HEADS": min(16, power_of_2(self.heads)),
            "R": self.rank,
            "P": self.width,
            "N": self.state,
            "PB": self.slice,
            "NB": self.padded_state,
            "V": self.vectors,
            "VARLEN": packed,
            "FULL": whole and not packed,
            "GATED": gated,
            "EXACT": exact,
            "PRECISION": precision(x),
        }
        self._ready: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def launch(
        self,
        name: str,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        more: Callable[[], dict[str, Any]],
        tuning: Tuning | None = None,
    ) -> None:
        """Launch `kernel`; its pointers come first, what else it takes is found by name in `sizes` and `more()`.

        A tensor that the kernel will not use may be None. `name` is the same only for launches that are the same.
        """
        stand_in = tensors[0]
        pointers = tuple(stand_in if t is None else t for t in tensors)
        ready = self._ready.get(name)
        if ready is not None:
            run, rest = ready
            run(*pointers, *rest)
            return
        numbers = {**self.sizes, **more()}
        names = kernel.arg_names[len(pointers) :]
        options = (tuning or self.config.narrow).options()
        compiled = kernel[grid](*pointers, **{n: numbers[n] for n in names}, **options)
        if not INTERPRET.value:
            self._ready[name] = compiled[grid], tuple(numbers[n] for n in names)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """New memory."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def table(self, cu_seqlens: Tensor | None) -> Tensor | None:
        """What `table_kernel` writes; None unless packed."""
        if cu_seqlens is None:
            return None
        table = self.empty(self.blocks, 4, dtype=torch.int32)
        more = {"S": self.n_seq, "C": self.blocks, "BLOCK": 64, "SEQUENCES": 64}
        grid = (cdiv(self.blocks, 64), 1, 1)
        self.launch("table", gpu_forward.table_kernel, grid, (cu_seqlens, table), lambda: more)
        return table

    def narrow_grid(self) -> tuple[int, int, int]:
        """The grid of the kernels over blocks and heads."""
        return self.blocks, cdiv(self.heads, self.sizes["HEADS"]), 1

    def new_vec(self) -> Tensor:
        """Memory for `vec`."""
        return self.empty(self.blocks, self.heads, self.vectors, self.block)

    def cut(self, tuning: Tuning) -> Pieces:
        """Cut the rows where that gives more programs, but not more than the device holds at once."""
        have = max(self.rows * self.columns, 1)
        pieces = max(tuning.programs * multiprocessors(self.device) // have, 1)
        size = max(cdiv(self.steps, pieces), SHORTEST)
        return Pieces(size, max(cdiv(self.steps, size), 1))

    def shares(self, programs: int) -> int:
        """Into how many shares the columns of a group fall to make so many programs a multiprocessor, at least."""
        per_group = self.columns // self.groups
        wanted = cdiv(programs * multiprocessors(self.device), max(self.blocks * self.groups, 1))
        return next(n for n in range(min(wanted, per_group), per_group + 1) if per_group % n == 0)

    def walk(
        self,
        x: Tensor,
        k: Tensor,
        vec: Tensor,
        table: Tensor | None,
        pieces: Pieces,
        initial: Tensor | None,
        entry: Tensor | None,
        out: Tensor | None,
        final: Tensor | None,
        decay: Tensor | None,
        reverse: bool,
    ) -> None:
        """Launch `state_kernel`; `decay` given: only what each piece adds, into `final`."""
        flags = {
            "SCAN": power_of_2(pieces.blocks),
            "REVERSE": reverse,
            "INITIAL": initial is not None,
            "ENTRY": entry is not None,
            "STORE": out is not None,
            "FINAL": final is not None and decay is None,
            "PIECE_FINAL": decay is not None,
        }
        self.launch(
            f"state{reverse}{pieces.blocks}{decay is None}",
            gpu_forward.state_kernel,
            (self.rows * pieces.pieces * self.columns, 1, 1),
            (x, k, vec, table, initial, entry, out, final, decay),
            lambda: {"PIECE": pieces.blocks, "PIECES": pieces.pieces, **strides(x=x, k=k), **flags},
            self.config.state,
        )

    def entries(
        self,
        x: Tensor,
        k: Tensor,
        vec: Tensor,
        table: Tensor | None,
        pieces: Pieces,
        initial: Tensor | None,
        reverse: bool,
    ) -> Tensor | None:
        """What enters each piece (pieces, H, P, N), from what the pieces before add; None for one piece a row."""
        if pieces.pieces == 1:
            return None
        final = self.empty(self.rows * pieces.pieces, self.heads, self.width, self.state)
        decay = self.empty(self.rows * pieces.pieces, self.heads)
        self.walk(x, k, vec, table, pieces, initial, None, None, final, decay, reverse)
        entry = torch.empty_like(final)
        size = self.width * self.state
        more = {"PIECES": pieces.pieces, "SIZE": size, "BLOCK": 1024, "REVERSE": reverse}
        grid = (cdiv(size, 1024), self.rows * self.heads, 1)
        kernel = gpu_forward.carry_kernel
        name = f"carry{reverse}{pieces.blocks}"
        self.launch(name, kernel, grid, (final, decay, entry), lambda: more)
        return entry

    def copy_empty(self, cu_seqlens: Tensor | None, given: Tensor | None, to: Tensor, name: str) -> None:
        """The states of packed sequences without tokens: those given, or zeros."""
        if cu_seqlens is not None:
            size = self.heads * self.width * self.state
            more = {"SIZE": size, "GIVEN": given is not None, "BLOCK": 1024}
            grid = (self.n_seq, 1, 1)
            self.launch(name, gpu_forward.empty_kernel, grid, (cu_seqlens, given, to), lambda: more)

    def states(
        self,
        x: Tensor,
        k: Tensor,
        vec: Tensor,
        table: Tensor | None,
        initial: Tensor | None,
        final: Tensor | None,
        reverse: bool,
    ) -> Tensor:
        """The state that enters each block (`reverse`: the gradient of the one that leaves it); `final` is filled."""
        pieces = self.cut(self.config.state)
        entry = self.entries(x, k, vec, table, pieces, initial, reverse)
        out = self.empty(self.blocks, self.columns, self.padded_state, self.slice, dtype=self.dtype)
        self.walk(x, k, vec, table, pieces, initial, entry, out, final, None, reverse)
        return out

    def forward(
        self,
        x: Tensor,
        k: Tensor,
        q: Tensor,
        vec: Tensor,
        D: Tensor | None,
        table: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """y (S, T, R, H, P) and the final states (n_seq, H, P, N)."""
        pieces = self.cut(self.config.forward)
        entry = self.entries(x, k, vec, table, pieces, initial, reverse=False)
        y = self.empty(*x.shape, dtype=self.dtype)
        final = self.empty(self.n_seq, self.heads, self.width, self.state)
        flags = {
            "SKIP": 0 if D is None else D.dim(),
            "INITIAL": initial is not None,
            "ENTRY": entry is not None,
            "PIECE": pieces.blocks,
            "PIECES": pieces.pieces,
        }
        self.launch(
            "forward",
            gpu_forward.forward_kernel,
            (self.rows * pieces.pieces * self.columns, 1, 1),
            (x, k, q, vec, D, table, initial, entry, y, final),
            lambda: {**strides(x=x, k=k, q=q), **flags},
            self.config.forward,
        )
        self.copy_empty(cu_seqlens, initial, final, "empty")
        return y, final

    def backward(
        self,
        dy: Tensor,
        dfinal: Tensor | None,
        x: Tensor,
        k: Tensor,
        q: Tensor,
        vec: Tensor,
        D: Tensor | None,
        table: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """The gradients of x, k, q and the initial state; `rows` and `inner` for the narrow ones."""
        states = self.states(x, k, vec, table, initial, None, reverse=False)
        dinitial = None if initial is None else self.empty(*initial.shape)
        gradients = self.states(dy, q, vec, table, dfinal, dinitial, reverse=True)
        if dinitial is not None:
            self.copy_empty(cu_seqlens, dfinal, dinitial, "empty back")
        rows = self.empty(self.blocks, self.columns, gpu_backward.ROWS, self.config.rows)
        inner = self.empty(self.blocks, self.columns, self.slice)
        dx = self.empty(*x.shape, dtype=self.dtype)
        skip = {"SKIP": 0 if D is None else D.dim()}
        shape = (self.rows, self.length, self.rank, self.groups, self.state)
        dk, dq = (self.empty(*shape, dtype=self.dtype) for _ in "kq")

        if self.columns == self.groups:
            self.launch(
                "own",
                gpu_backward.own_kernel,
                (self.blocks * self.heads, 1, 1),
                (x, k, q, dy, states, gradients, vec, D, table, rows, inner, dx, dk, dq),
                lambda: {**strides(x=x, k=k, q=q, dy=dy), **skip},
                self.config.own,
            )
            return dx, dk, dq, dinitial, rows, inner

        per_group = self.columns // self.groups
        shares = self.shares(SHARE_PROGRAMS)
        through_k, through_q = self.empty(2, shares, *shape)
        parts = None if shares == 1 else self.empty(2, shares, *shape)
        grid = (self.blocks * self.groups * shares, 1, 1)
        share = {"SHARE": per_group // shares}
        self.launch(
            "pair",
            gpu_backward.pair_kernel,
            grid,
            (x, k, q, dy, vec, table, rows, through_q, through_k),
            lambda: {**strides(x=x, k=k, q=q, dy=dy), **share},
            self.config.pair,
        )
        self.launch(
            "key",
            gpu_backward.state_rows_kernel,
            grid,
            (
                x,
                k,
                gradients,
                gradients,
                vec,
                table,
                rows,
                inner,
                through_k,
                dk if parts is None else parts[0],
            ),
            lambda: {**strides(x=x, k=k), **share, "QUERY": False},
            self.config.key,
        )
        self.launch(
            "query",
            gpu_backward.state_rows_kernel,
            grid,
            (dy, q, states, gradients, vec, table, rows, inner, through_q, dq if parts is None else parts[1]),
            lambda: {**strides(x=dy, k=q), **share, "QUERY": True},
            self.config.query,
        )
        value_shares = self.shares(VALUE_PROGRAMS)
        self.launch(
            "value",
            gpu_backward.value_kernel,
            (self.blocks * self.groups * value_shares, 1, 1),
            (x, k, q, dy, gradients, vec, D, table, rows, dx),
            lambda: {**strides(x=x, k=k, q=q, dy=dy), **skip, "SHARE": per_group // value_shares},
            self.config.value,
        )
        if parts is not None:
            more = {"SIZE": dk.numel(), "SHARES": shares, "BLOCK": 1024}
            grid = (cdiv(dk.numel(), 1024), 2, 1)
            self.launch("shares", gpu_backward.shares_kernel, grid, (parts, dk, dq), lambda: more)
        return dx, dk, dq, dinitial, rows, inner

    def skip_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """The gradient of D (H, P)."""
        tokens = 128
        steps = cdiv(self.length, tokens)
        sums = self.empty(self.rows * steps, self.heads, self.width)
        self.launch(
            "skip",
            gpu_backward.skip_kernel,
            (self.rows * steps, self.heads, 1),
            (x, dy, sums),
            lambda: {**strides(x=x, dy=dy), "K": steps, "T": tokens, "PB": power_of_2(self.width)},
        )
        return sums.sum(0)


_plans: dict[Any, Plan] = {}


def plan_of(kind: Any, tensors: tuple[Tensor | None, ...], make: Callable[[], Plan]) -> Plan:
    """The plan for a kind of call (hashable) on tensors like these: made by `make`, or kept from an earlier call."""
    key = (
        kind,
        *(
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)
            for t in tensors
        ),
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        plan = _plans[key] = make()
    return plan


def strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of wide tensors (S, T, R, heads, channels) as the kernels name them."""
    return {
        f"{name}_{letter}": n
        for name, t in tensors.items()
        for letter, n in zip("strh", t.stride()[:4], strict=True)
    }


def narrow_strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of tensors (S, T, H)."""
    return {
        f"{name}_{letter}": n
        for name, t in tensors.items()
        for letter, n in zip("sth", t.stride(), strict=True)
    }


def as_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`, its last dimension without gaps."""
    if t.dtype != dtype:
        t = t.to(dtype)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_dense(t: Tensor | None) -> Tensor | None:
    """t without gaps."""
    return None if t is None else t.contiguous()


def none_is_empty(like: Tensor, t: Tensor | None) -> Tensor:
    """t, or an empty tensor for None: ops return tensors."""
    return like.new_empty(0) if t is None else t
