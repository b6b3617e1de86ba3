"""What a model returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from plait.models.cache import Cache


@dataclass
class Output:
    """Fields by name or by key; a field that was not asked for is None and not among the keys."""

    loss: Tensor | None = None  # mean over the targets
    logits: Tensor | None = None  # (B, T, V) for language models, (B, n_labels) for classification
    hidden: Tensor | None = None  # (B, T, d): after the final norm
    loss_sum: Tensor | None = None  # the same loss before the division
    n_targets: Tensor | None = None  # what it is divided by
    cache: Cache | None = None  # the state after this call, if a cache was given

    def __getitem__(self, key: str) -> object:
        if key not in self.keys():
            raise KeyError(f"{key!r} is not in this output; it has {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The names of the fields that are set."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]
