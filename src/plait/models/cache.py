"""All layers' states and each sequence's position: made by the model, held by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.config.errors import CapacityError
from plait.mixers.state import State

_SMALLEST_BOUND = 64


@dataclass
class Cache:
    """The memory of S sequences after ``lengths`` tokens each; at most ``capacity`` tokens fit."""

    states: list[State]
    positions: Tensor  # (S,) int64 on the model's device: tokens seen, for kernels
    lengths: list[int]  # the same on the host, for shapes and checks
    capacity: int

    def clone(self) -> Cache:
        """A copy that shares no memory: a fork, or a point to come back to."""
        return Cache(
            [s.clone() for s in self.states], self.positions.clone(), list(self.lengths), self.capacity
        )

    def select(self, rows: Sequence[int]) -> Cache:
        """The given sequences in that order, as a copy; rows may repeat."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.positions.device)
        return Cache(
            [s.select(index) for s in self.states],
            self.positions[index],
            [self.lengths[i] for i in rows],
            self.capacity,
        )

    def to(self, device: torch.device | str) -> Cache:
        """The same cache on another device."""
        return Cache(
            [s.to(device) for s in self.states], self.positions.to(device), list(self.lengths), self.capacity
        )

    def detach(self) -> Cache:
        """The same cache, cut from the graph."""
        return Cache([s.detach() for s in self.states], self.positions, list(self.lengths), self.capacity)

    @property
    def n_seq(self) -> int:
        """S, the number of sequences."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(s.nbytes for s in self.states)

    @property
    def max_past(self) -> int:
        """An upper bound of the lengths that changes seldom (powers of two), so that shapes do too."""
        longest = max(self.lengths, default=0)
        if longest == 0:
            return 0
        return min(self.capacity, max(_SMALLEST_BOUND, 1 << (longest - 1).bit_length()))

    def check_room(self, new: Sequence[int]) -> None:
        """Raise CapacityError if a sequence would outgrow the capacity; nothing has been written then."""
        for row, (held, more) in enumerate(zip(self.lengths, new, strict=True)):
            if held + more > self.capacity:
                raise CapacityError(
                    f"sequence {row} holds {held} tokens and {more} more would exceed the cache's capacity of "
                    f"{self.capacity}: make the cache with a larger capacity"
                )

    def advance(self, new: Sequence[int], lengths: Tensor) -> None:
        """Count ``new`` tokens a sequence (``lengths`` (S,) on the device) as seen."""
        self.positions.add_(lengths)
        self.lengths = [held + more for held, more in zip(self.lengths, new, strict=True)]
