"""Layouts and tiles of the chunk engine: cutting rows into blocks of chunks, decays, the masked tiles.

Glossary: C chunks, Q tokens a chunk, R rows a token (Mamba-3's rank), M = Q R rows a chunk, H heads, G groups of k
and q, F = H / G heads a group, P head width, N state size, B chunks in a block. Three orders of the same numbers:
rows (B, M, G, F, P); groups (B G, M, F P), where all heads of a group share a matmul with k or q; heads
(B H, M, P), for the tiles. States are (C, G, N, F P). On a CPU a block of chunks fits the cache, elsewhere and
under torch.compile it is everything. Wide intermediates live in a few named rooms that every block uses again: a
CPU writes fresh memory several times slower than memory it has just used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.chunks import compute_dtype

# Decays go no lower: exp(-60) is nothing beside what a float32 sum holds, and its products stay clear of denormal
# numbers, which cost a CPU a hundred times the normal ones.
FLOOR = {torch.float32: -60.0, torch.float64: -600.0}
# Elements of a block's widest temporary on a CPU, per thread: larger ones spill, smaller ones pay per operation.
BLOCK_ELEMENTS = 1 << 18


class Sizes(NamedTuple):
    """The integers of a Plan."""

    size: int
    steps: int
    n_chunk: int
    n_seq: int
    length: int


class Maps(NamedTuple):
    """The index tensors of a Plan, flat, as an autograd.Function wants its arguments; None where not needed."""

    gather: Tensor | None
    """(C*Q,) the token in each slot; None: slot i holds token i"""
    scatter: Tensor | None
    """(C*Q,) the token in each slot, n for pads"""
    valid: Tensor | None
    """(C, Q) which slots hold a token"""
    slot: Tensor | None
    """(n,) the slot of each token"""
    order: Tensor | None
    rank: Tensor | None
    chunk: Tensor | None


class Run:
    """One run of the engine: its sizes, its decays, and how its tensors are cut and put together."""

    def __init__(
        self,
        x: Tensor,
        k: Tensor,
        a: Tensor,
        w: Tensor,
        diagonal: Tensor | None,
        skip: Tensor | None,
        sizes: Sizes,
        maps: Maps,
    ) -> None:
        self.sizes, self.maps, self.dtype, self.skip = sizes, maps, compute_dtype(x), skip
        self.rank, self.n_head, self.width = x.shape[1:]
        self.groups, self.state = k.shape[2:]
        self.per_group = self.n_head // self.groups
        self.rows = sizes.size * self.rank
        self._rooms: dict[str, Tensor] = {}
        token = torch.arange(self.rows, device=x.device) // self.rank
        row, column = token.unsqueeze(1), token
        self.same = None if diagonal is None else (row == column).to(self.dtype)
        self.mask = (row >= column if diagonal is None else row > column).to(self.dtype)
        self.later = torch.ones_like(self.mask).tril(-1)
        self._decays(a, w, diagonal)

    def _decays(self, a: Tensor, w: Tensor, diagonal: Tensor | None) -> None:
        """The decays of all chunks, as rows (C, M, G, F, 1) and for the tiles (C, H, M).

        Running sums are float64 where the device has it. A tile needs their differences in the compute dtype:
        `high` plus `low` keeps what one float32 of a large sum would round away.
        """
        wide = torch.float32 if a.device.type == "mps" else torch.float64
        # exp(-1000) is 0 in any dtype; clamped, one such step leaves the sum its low digits.
        sums = self.narrow(a).to(wide).clamp(min=-1000.0).cumsum(1)
        total = sums[:, -1:]
        begin, end = self._exp(sums), self._exp(total - sums)
        high = sums.to(self.dtype)
        self.low = None if wide == self.dtype else self._for_tiles((sums - high).to(self.dtype))
        self.high = self.high_rows = self._for_tiles(high)
        weight = self.narrow(w)
        if self.maps.valid is not None:
            pads = ~self.maps.valid.unsqueeze(2)
            begin = begin.masked_fill(pads, 0)
            # exp(-inf - c_j): nothing reaches a pad's row, and so nothing comes back from it in the gradient.
            self.high_rows = self._for_tiles(high.masked_fill(pads, -math.inf))
        self.chunk_decay = self._exp(total).view(-1, self.groups, 1, self.per_group, 1)
        self.from_begin = self._for_rows(begin)
        self.to_end = self._for_rows(end * weight)
        self.to_end_unweighted = self._for_rows(end)
        self.weight = self._for_tiles(weight)
        self.diagonal = None if diagonal is None else self._for_tiles(self.narrow(diagonal))

    def _exp(self, t: Tensor) -> Tensor:
        return torch.where(t < FLOOR[self.dtype], 0.0, t.exp()).to(self.dtype)

    def _for_rows(self, t: Tensor) -> Tensor:
        return self._repeat(t).view(-1, self.rows, self.groups, self.per_group, 1)

    def _for_tiles(self, t: Tensor) -> Tensor:
        return self._repeat(t).transpose(1, 2).contiguous()

    def _repeat(self, t: Tensor) -> Tensor:
        return t if self.rank == 1 else t.repeat_interleave(self.rank, 1)

    def narrow(self, t: Tensor) -> Tensor:
        """A per-token tensor (n, H) by chunks (C, Q, H); 0 in pads."""
        if self.maps.gather is None or self.maps.valid is None:
            return t.reshape(-1, self.sizes.size, self.n_head)
        t = t.index_select(0, self.maps.gather).view(-1, self.sizes.size, self.n_head)
        return t.masked_fill(~self.maps.valid.unsqueeze(2), 0)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The ranges of chunks to work on at a time."""
        step = self.sizes.n_chunk
        if not torch.compiler.is_compiling() and self.mask.device.type == "cpu":
            elements = self.n_head * self.rows * max(self.rows, self.width)
            step = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // elements)
        for lo in range(0, self.sizes.n_chunk, step):
            yield lo, min(lo + step, self.sizes.n_chunk)

    def into(self, room: str, shape: tuple[int, ...], op: Callable[..., Tensor], *args: Any) -> Tensor:
        """op(*args), of this shape, written into the named room.

        A compiler plans its own memory, and does not take `out` into part of a buffer.
        """
        return op(*args) if torch.compiler.is_compiling() else op(*args, out=self._memory(room, shape))

    def copy(self, room: str, t: Tensor) -> Tensor:
        """A contiguous copy of t in the named room."""
        return t.contiguous() if torch.compiler.is_compiling() else self._memory(room, t.shape).copy_(t)

    def _memory(self, room: str, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        memory = self._rooms.get(room)
        if memory is None or memory.shape[0] < size:
            memory = self._rooms[room] = torch.empty(size, dtype=self.dtype, device=self.mask.device)
        return memory[:size].view(shape)

    def take(self, t: Tensor, lo: int, hi: int, room: str) -> Tensor:
        """The tokens of chunks lo..hi of t (n, R, A, B) as rows (B, M, A, B); pads repeat a token."""
        begin, end = lo * self.sizes.size, hi * self.sizes.size
        shape = (hi - lo, self.rows, *t.shape[2:])
        gather = self.maps.gather
        if gather is None:
            return t[begin:end].to(self.dtype).reshape(shape)
        if t.dtype != self.dtype:
            return t.index_select(0, gather[begin:end]).to(self.dtype).view(shape)
        rows = (end - begin, *t.shape[1:])
        return self.into(room, rows, torch.index_select, t, 0, gather[begin:end]).view(shape)

    def put(self, out: Tensor, value: Tensor, lo: int, hi: int) -> None:
        """Write rows (B, M, ...) of chunks lo..hi to their tokens in `out` (n + 1, ...); pads go to row n."""
        begin, end = lo * self.sizes.size, hi * self.sizes.size
        value = value.reshape(end - begin, *out.shape[1:])
        if self.maps.scatter is None:
            out[begin:end] = value
        else:
            out.index_copy_(0, self.maps.scatter[begin:end], value.to(out.dtype))

    def new_output(self, like: Tensor) -> Tensor:
        """Memory for one result a token, and a last row for the pads."""
        return torch.empty(like.shape[0] + 1, *like.shape[1:], dtype=like.dtype, device=like.device)

    def finish(self, out: Tensor) -> Tensor:
        """`new_output` without its last row."""
        return out[:-1]

    def new_states(self) -> Tensor:
        """Memory for a state a chunk and the two spare entries of the sweep."""
        shape = (self.sizes.n_chunk + 2, self.groups, self.state, self.per_group * self.width)
        states = torch.empty(shape, dtype=self.dtype, device=self.mask.device)
        states[-2:] = -0.0
        return states

    def load(self, states: Tensor, lo: int, hi: int) -> Tensor:
        """The states of chunks lo..hi as (B G, N, F P)."""
        return states[lo:hi].view(-1, self.state, self.per_group * self.width)

    def store(self, states: Tensor, a: Tensor, b: Tensor, lo: int, hi: int) -> None:
        """Write a @ b (B G, N, F P) as the states of chunks lo..hi."""
        if torch.compiler.is_compiling():
            self.load(states, lo, hi).copy_(torch.bmm(a, b))
        else:
            torch.bmm(a, b, out=self.load(states, lo, hi))

    def heads(self, t: Tensor, lo: int, hi: int, room: str) -> Tensor:
        """Chunks lo..hi of x or dy (n, R, H, P) as rows (B, M, G, F, P)."""
        return self.take(t, lo, hi, room).view(hi - lo, self.rows, self.groups, self.per_group, self.width)

    def grouped(self, t: Tensor, lo: int, hi: int, room: str) -> Tensor:
        """Chunks lo..hi of k or q (n, R, G, N) as (B G, M, N)."""
        t = self.take(t, lo, hi, room + " rows").transpose(1, 2)
        if self.groups > 1:
            t = self.copy(room, t)
        return t.reshape(-1, self.rows, self.state)

    def ungrouped(self, t: Tensor) -> Tensor:
        """Undo `grouped`: (B G, M, N) to (B, M, G, N)."""
        return t.view(-1, self.groups, self.rows, self.state).transpose(1, 2)

    def scaled(self, t: Tensor, scale: Tensor, room: str) -> Tensor:
        """Rows times scale (B, M, G, F, 1), as groups (B G, M, F P)."""
        t = t.transpose(1, 2)
        out = self.into(room, t.shape, torch.mul, t, scale.transpose(1, 2))
        return out.reshape(-1, self.rows, self.per_group * self.width)

    def from_groups(self, t: Tensor) -> Tensor:
        """(B G, M, F P) to rows."""
        return t.view(-1, self.groups, self.rows, self.per_group, self.width).transpose(1, 2)

    def to_heads(self, t: Tensor, room: str) -> Tensor:
        """Rows to (B H, M, P)."""
        t = t.permute(0, 2, 3, 1, 4)
        return self.copy(room, t).reshape(-1, self.rows, self.width)

    def from_heads(self, t: Tensor) -> Tensor:
        """(B H, M, P) to rows."""
        t = t.view(-1, self.groups, self.per_group, self.rows, self.width)
        return t.permute(0, 3, 1, 2, 4)

    def bmm(self, a: Tensor, b: Tensor, room: str) -> Tensor:
        """a @ b into a room."""
        return self.into(room, (a.shape[0], a.shape[1], b.shape[2]), torch.bmm, a, b)

    def tile(self, q: Tensor, k: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor]:
        """The map from x to y within each of the chunks lo..hi: (B, G, F, M, M), with what it is made of.

        Returns the tile, the products q k^T (B, G, 1, M, M) without mask, and the decays exp(c_i - c_j)
        (B, G, F, M, M), which are right only under the mask.
        """
        products = torch.bmm(q, k.mT).view(-1, self.groups, 1, self.rows, self.rows)
        shape = (hi - lo, self.groups, self.per_group, self.rows)
        rows, columns = self.high_rows[lo:hi].unsqueeze(3), self.high[lo:hi].unsqueeze(2)
        decay = self.into("decay", (hi - lo, self.n_head, self.rows, self.rows), torch.sub, rows, columns)
        if self.low is not None:
            low = self.low[lo:hi]
            decay.add_(low.unsqueeze(3)).sub_(low.unsqueeze(2))
        # Above the diagonal differences are positive: the clamp makes them 0 before exp, the mask removes them.
        decay.clamp_(FLOOR[self.dtype], 0.0).exp_()
        decay = decay.view(*shape, self.rows)
        weight = self.weight[lo:hi].view(shape).unsqueeze(3)
        tile = self.into("tile", decay.shape, torch.mul, decay, weight)
        tile.mul_(products * self.mask)
        if self.diagonal is not None and self.same is not None:
            tile.addcmul_(products * self.same, self.diagonal[lo:hi].view(shape).unsqueeze(3))
        if self.skip is not None:
            tile.diagonal(dim1=3, dim2=4).add_(self.skip.view(self.groups, self.per_group, 1))
        return tile, products, decay
