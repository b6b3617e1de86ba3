"""How the kernels of `gpu_forward.py` and `gpu_backward.py` are tiled and launched, for Mamba-2 and Mamba-3 alike.

A `Plan` is made once for a kind of call (shapes, strides, dtypes) and kept: it is a `Program` of launches on tensors
that it knows by name. Letters: gpu_forward.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops.ssd import gpu_backward, gpu_forward, gpu_steps
from plait.ops.triton_launch import Plans, Program
from plait.ops.triton_sums import TOTALS, totals_grid, totals_kernel
from plait.ops.triton_support import INTERPRET, cdiv, multiprocessors, power_of_2, precision, shared_memory

SHORTEST = 1 if INTERPRET.value else 8
"""Blocks of the shortest piece."""
SHARE_PROGRAMS, VALUE_PROGRAMS = 6, 12
"""Programs a multiprocessor into which the heads of groups are shared out, at least: where sums over them have to be
added up afterwards, and where not."""


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
    twice: bool = True
    """Of 16-bit inputs: states are added up from two parts of what each token adds. Where decays are slow, rounding it
    once costs dA twice the error, and ddt and dt_bias a quarter more; a second product costs less than wider states."""
    forward: Tuning = Tuning()
    state: Tuning = Tuning(stages=3)
    pair: Tuning = Tuning(registers=168, programs=3)
    query: Tuning = Tuning()
    key: Tuning = Tuning(stages=3)
    value: Tuning = Tuning(stages=3)
    own: Tuning = Tuning(stages=1)
    narrow: Tuning = Tuning(stages=1)


ONE_STAGE: dict[str, Any] = dict.fromkeys(
    ("forward", "state", "pair", "query", "key", "value", "own"), Tuning(stages=1)
)
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


@cache
def holds_own(device: torch.device) -> bool:
    """Whether a program can hold all that `own_kernel` does: before Hopper products want their tiles in registers."""
    if INTERPRET.value:
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


class Pieces(NamedTuple):
    """How the rows are cut."""

    blocks: int
    """blocks a piece"""
    pieces: int
    """pieces a row"""


class Named(NamedTuple):
    """A wide tensor (S, T, R, heads, channels) by its name, and one like it."""

    name: str
    like: Tensor

    def strides(self, letter: str) -> dict[str, int]:
        """Its strides as the kernels name them: x_s, x_t, x_r, x_h."""
        return {f"{letter}_{d}": n for d, n in zip("strh", self.like.stride()[:4], strict=True)}


class Plan:
    """The sizes of one kind of call, and its launches on tensors with the names `given`.

    Made from x (S, T, R, H, P) and k (S, T, R, G, N).
    """

    def __init__(
        self, given: tuple[str, ...], x: Tensor, k: Tensor, n_seq: int, *, packed: bool, gated: bool
    ) -> None:
        self.rows, self.length, self.rank, self.heads, self.width = x.shape
        self.groups, self.state = k.shape[3:]
        self.n_seq, self.packed = n_seq, packed
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
        whole = self.length % self.block == 0 and self.block * self.rank == config.rows
        heads = min(16, power_of_2(self.heads))
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
            "HEADS": heads,
            "R": self.rank,
            "P": self.width,
            "N": self.state,
            "PB": self.slice,
            "NB": self.padded_state,
            "V": 2 + gated + exact,
            "VARLEN": packed,
            "FULL": whole and not packed,
            "GATED": gated,
            "EXACT": exact,
            "PRECISION": precision(x),
        }
        self.narrow_grid = (self.blocks, cdiv(self.heads, heads), 1)
        self.program = Program(given)
        self.table = None
        if packed:
            self.table = self.program.memory("table", self.blocks, 4, dtype=torch.int32)
            more = {"S": n_seq, "C": self.blocks, "BLOCK": 64, "SEQUENCES": 64}
            self.launch(gpu_steps.table_kernel, (cdiv(self.blocks, 64), 1, 1), ("cu", "table"), more)

    def add_vec(self) -> None:
        """Memory for `vec`."""
        self.program.memory("vec", self.blocks, self.heads, self.sizes["V"], self.block)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: tuple[str | None, ...],
        more: Mapping[str, Any],
        tuning: Tuning | None = None,
    ) -> None:
        """Launch `kernel` next, on these tensors; what else it takes is found by name in `more` and `sizes`."""
        options = (tuning or self.config.narrow).options()
        self.program.add(kernel, grid, tensors, {**self.sizes, **more}, **options)

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
        x: Named,
        k: Named,
        pieces: Pieces,
        initial: str | None,
        entry: str | None,
        out: str | None,
        final: str | None,
        decay: str | None,
        reverse: bool,
    ) -> None:
        """Launch `state_kernel`; `decay` given: only what each piece adds, into `final`."""
        more = {
            "SCAN": power_of_2(pieces.blocks),
            "REVERSE": reverse,
            "INITIAL": initial is not None,
            "ENTRY": entry is not None,
            "STORE": out is not None,
            "FINAL": final is not None and decay is None,
            "PIECE_FINAL": decay is not None,
            "TWICE": self.config.twice and not self.sizes["EXACT"],
            "PIECE": pieces.blocks,
            "PIECES": pieces.pieces,
            **x.strides("x"),
            **k.strides("k"),
        }
        grid = (self.rows * pieces.pieces * self.columns, 1, 1)
        names = (x.name, k.name, "vec", self.table, initial, entry, out, final, decay)
        self.launch(gpu_forward.state_kernel, grid, names, more, self.config.state)

    def entries(self, x: Named, k: Named, pieces: Pieces, initial: str | None, reverse: bool) -> str | None:
        """What enters each piece (pieces, H, P, N), from what the pieces before add; None for one piece a row."""
        if pieces.pieces == 1:
            return None
        names = tuple(f"{what} {x.name}" for what in ("added", "decay", "entry"))
        added, decay, entry = names
        count, size = self.rows * pieces.pieces, self.width * self.state
        for name in (added, entry):
            self.program.memory(name, count, self.heads, self.width, self.state)
        self.program.memory(decay, count, self.heads)
        self.walk(x, k, pieces, initial, None, None, added, decay, reverse)
        more = {"PIECES": pieces.pieces, "SIZE": size, "BLOCK": 1024, "REVERSE": reverse}
        grid = (cdiv(size, 1024), self.rows * self.heads, 1)
        self.launch(gpu_forward.carry_kernel, grid, names, more)
        return entry

    def copy_empty(self, given: str | None, to: str) -> None:
        """The states of packed sequences without tokens: those given, or zeros."""
        if self.packed:
            size = self.heads * self.width * self.state
            more = {"SIZE": size, "GIVEN": given is not None, "BLOCK": 1024}
            self.launch(gpu_forward.empty_kernel, (self.n_seq, 1, 1), ("cu", given, to), more)

    def states(
        self, to: str, x: Named, k: Named, initial: str | None, final: str | None, reverse: bool
    ) -> None:
        """The state that enters each block (`reverse`: the gradient of the one that leaves it); `final` is filled."""
        pieces = self.cut(self.config.state)
        entry = self.entries(x, k, pieces, initial, reverse)
        self.program.memory(to, self.blocks, self.columns, self.padded_state, self.slice, dtype=self.dtype)
        self.walk(x, k, pieces, initial, entry, to, final, None, reverse)

    def forward(self, x: Named, k: Named, q: Named, D: Tensor | None, initial: str | None) -> None:
        """y (S, T, R, H, P) and the final states (n_seq, H, P, N)."""
        pieces = self.cut(self.config.forward)
        entry = self.entries(x, k, pieces, initial, reverse=False)
        more = {
            "SKIP": 0 if D is None else D.dim(),
            "INITIAL": initial is not None,
            "ENTRY": entry is not None,
            "PIECE": pieces.blocks,
            "PIECES": pieces.pieces,
            **x.strides("x"),
            **k.strides("k"),
            **q.strides("q"),
        }
        grid = (self.rows * pieces.pieces * self.columns, 1, 1)
        names = (x.name, k.name, q.name, "vec", "D", self.table, initial, entry, "y", "final")
        self.launch(gpu_forward.forward_kernel, grid, names, more, self.config.forward)
        self.copy_empty(initial, "final")

    def backward(
        self,
        dy: Named,
        x: Named,
        k: Named,
        q: Named,
        D: Tensor | None,
        initial: str | None,
        dfinal: str | None,
    ) -> None:
        """The gradients dx, dk, dq and dinitial; `rows` and `inner` for the narrow ones."""
        self.states("states", x, k, initial, None, reverse=False)
        self.states("gradients", dy, q, dfinal, None if initial is None else "dinitial", reverse=True)
        if initial is not None:
            self.copy_empty(dfinal, "dinitial")
        self.program.memory("rows", self.blocks, self.columns, gpu_backward.ROWS, self.config.rows)
        self.program.memory("inner", self.blocks, self.columns, self.slice)
        skip = 0 if D is None else D.dim()
        wide = {**x.strides("x"), **k.strides("k"), **q.strides("q"), **dy.strides("dy"), "SKIP": skip}
        four = (x.name, k.name, q.name, dy.name)

        if self.columns == self.groups and holds_own(self.device):
            to = ("vec", "D", self.table, "rows", "inner", "dx", "dk", "dq")
            grid = (self.blocks * self.heads, 1, 1)
            all_names = (*four, "states", "gradients", *to)
            self.launch(gpu_backward.own_kernel, grid, all_names, wide, self.config.own)
            return

        per_group = self.columns // self.groups
        shares = self.shares(SHARE_PROGRAMS)
        shape = (self.rows, self.length, self.rank, self.groups, self.state)
        for name in ("through k", "through q"):
            self.program.memory(name, shares, *shape)
        dk, dq = "dk", "dq"
        if shares > 1:
            dk = self.program.memory("parts of dk", shares, *shape)
            dq = self.program.memory("parts of dq", shares, *shape)
        grid = (self.blocks * self.groups * shares, 1, 1)
        share = {"SHARE": per_group // shares}
        names: tuple[str | None, ...] = (*four, "vec", self.table, "rows", "through q", "through k")
        self.launch(gpu_backward.pair_kernel, grid, names, {**wide, **share}, self.config.pair)
        both = ("gradients", "vec", self.table, "rows", "inner")
        more = {**x.strides("x"), **k.strides("k"), **share, "QUERY": False}
        names = (x.name, k.name, "gradients", *both, "through k", dk)
        self.launch(gpu_backward.state_rows_kernel, grid, names, more, self.config.key)
        more = {**dy.strides("x"), **q.strides("k"), **share, "QUERY": True}
        names = (dy.name, q.name, "states", *both, "through q", dq)
        self.launch(gpu_backward.state_rows_kernel, grid, names, more, self.config.query)
        value_shares = self.shares(VALUE_PROGRAMS)
        grid = (self.blocks * self.groups * value_shares, 1, 1)
        names = (*four, "gradients", "vec", "D", self.table, "rows", "dx")
        more = {**wide, "SHARE": per_group // value_shares}
        self.launch(gpu_backward.value_kernel, grid, names, more, self.config.value)
        if shares > 1:
            size = prod(shape)
            more = {"SIZE": size, "SHARES": shares, "BLOCK": 1024}
            self.launch(gpu_backward.shares_kernel, (cdiv(size, 1024), 2, 1), (dk, dq, "dk", "dq"), more)

    def totals(self, parts: str, count: int, columns: int, *to: str | None) -> None:
        """Sum parts (tensors, count, columns), float32, into tensors that hold so many columns."""
        first, second, third = (*to, None, None)[:3]
        more = {"parts": count, "columns": columns, "SECOND": bool(second), "THIRD": bool(third), **TOTALS}
        grid = totals_grid(columns, 3 if third else 2 if second else 1)
        self.launch(totals_kernel, grid, (parts, first, second, third), more)

    def skip_gradient(self, x: Named, dy: Named) -> None:
        """The gradient of D (H, P)."""
        tokens = 128
        steps = cdiv(self.length, tokens)
        self.program.memory("parts of dD", self.rows * steps, self.heads, self.width)
        more = {"K": steps, "T": tokens, "PB": power_of_2(self.width), **x.strides("x"), **dy.strides("dy")}
        grid = (self.rows * steps, self.heads, 1)
        self.launch(gpu_steps.skip_kernel, grid, (x.name, dy.name, "parts of dD"), more)
        self.totals("parts of dD", self.rows * steps, self.heads * self.width, "dD")


plans: Plans[Plan] = Plans()
"""Of the kinds of calls so far."""


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


def kind(t: Tensor | None) -> Any:
    """What a plan knows of a small tensor without gaps."""
    return None if t is None else (t.dtype, t.dim())


def new_like(t: Tensor) -> Tensor:
    """New memory for a gradient of t, without gaps."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def none_is_empty(like: Tensor, t: Tensor | None) -> Tensor:
    """t, or an empty tensor for None: ops return tensors."""
    return like.new_empty(0) if t is None else t
