"""Which tokens of x belong to which sequence: built once a call by the model, shared by all layers.

S sequences in one of two forms. *Dense*: x is (S, T, d), T new tokens each. *Packed*: x is (1, n, d) and
``cu_seqlens`` (S+1) bounds sequences of any length, 0 included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.ops.chunks import token_map


@dataclass(frozen=True, eq=False)
class Layout:
    """Device tensors for what varies, host numbers only as upper bounds, so that nothing has to synchronise."""

    start: Tensor  # (S,) int64: tokens of each sequence that its state already holds
    positions: Tensor  # (S, T) dense or (1, n) packed, int64: the position of each new token in its sequence
    max_new: int  # no sequence has more new tokens
    max_past: int  # no sequence has more tokens in its state
    cu_seqlens: Tensor | None = None  # (S+1,) int32, packed only
    seq_index: Tensor | None = None  # (n,) int64, packed only: the sequence of each token
    ids: Tensor | None = None  # (S, T) or (1, n): the new tokens themselves, if x was made of ids

    @staticmethod
    def dense(
        n_seq: int,
        length: int,
        *,
        start: Tensor | None = None,
        max_past: int = 0,
        device: torch.device | str | None = None,
        ids: Tensor | None = None,
    ) -> Layout:
        """S sequences of the same number of new tokens."""
        if start is None:
            start = torch.zeros(n_seq, dtype=torch.int64, device=device)
        positions = start[:, None] + torch.arange(length, device=start.device)
        return Layout(start, positions, length, max_past, ids=ids)

    @staticmethod
    def packed(
        cu_seqlens: Tensor | Sequence[int],
        n_tokens: int,
        max_new: int,
        *,
        start: Tensor | None = None,
        max_past: int = 0,
        device: torch.device | str | None = None,
        ids: Tensor | None = None,
    ) -> Layout:
        """Sequences of any length side by side in one row of ``n_tokens``, bounded by ``cu_seqlens`` (S+1)."""
        cu = torch.as_tensor(cu_seqlens, dtype=torch.int32, device=device)
        if start is None:
            start = torch.zeros(cu.shape[0] - 1, dtype=torch.int64, device=cu.device)
        seq_index, offset = token_map(cu, n_tokens)
        positions = start[seq_index] + offset
        return Layout(start, positions[None], max_new, max_past, cu, seq_index, ids)

    @staticmethod
    def from_lengths(
        lengths: Sequence[int],
        *,
        start: Tensor | None = None,
        max_past: int = 0,
        device: torch.device | str | None = None,
    ) -> Layout:
        """Packed, from the number of new tokens of each sequence."""
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return Layout.packed(
            bounds, bounds[-1], max(lengths, default=0), start=start, max_past=max_past, device=device
        )

    @property
    def n_seq(self) -> int:
        """S, the number of sequences."""
        return self.start.shape[0]

    @property
    def is_packed(self) -> bool:
        """Whether x is one row of sequences bounded by ``cu_seqlens``."""
        return self.cu_seqlens is not None

    @property
    def lengths(self) -> Tensor:
        """(S,) int64: the number of new tokens of each sequence."""
        if self.cu_seqlens is None:
            return torch.full_like(self.start, self.positions.shape[1])
        return (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).to(torch.int64)

    @property
    def offsets(self) -> Tensor:
        """(n,) int64, packed only: the place of each token among the new tokens of its sequence."""
        assert self.seq_index is not None
        return self.positions[0] - self.start[self.seq_index]

    def pad(self, x: Tensor) -> Tensor:
        """Packed (1, n, ...) to (S, max_new, ...), zeros on the right; dense x unchanged."""
        if self.seq_index is None:
            return x
        out = x.new_zeros(self.n_seq, self.max_new, *x.shape[2:])
        return out.index_put((self.seq_index, self.offsets), x[0])

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of ``pad``."""
        if self.seq_index is None:
            return x
        return x[self.seq_index, self.offsets][None]
