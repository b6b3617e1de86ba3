"""What one layer remembers of the past: named tensors whose dimension 0 is the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class State(dict[str, Tensor]):
    """A dict of tensors (S, ...); no positions, lengths or counters, those are the cache's."""

    def clone(self) -> State:
        """A copy that shares no memory."""
        return State({name: tensor.clone() for name, tensor in self.items()})

    def select(self, rows: Tensor | Sequence[int]) -> State:
        """The given sequences, in that order; rows may repeat."""
        return State({name: tensor[rows] for name, tensor in self.items()})

    def to(self, *args: Any, **kwargs: Any) -> State:
        """``Tensor.to`` of every tensor."""
        return State({name: tensor.to(*args, **kwargs) for name, tensor in self.items()})

    def detach(self) -> State:
        """The same numbers, cut from the graph: the boundary of truncated backpropagation through time."""
        return State({name: tensor.detach() for name, tensor in self.items()})

    def write(self, other: State) -> None:
        """Copy another state's numbers into these tensors, whose addresses stay."""
        for name, tensor in self.items():
            tensor.copy_(other[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.values())
