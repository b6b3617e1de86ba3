"""What a model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from plait.models.cache import Cache

Logits = Tensor | Callable[[], Tensor] | None


@dataclass(init=False, repr=False, eq=False)
class Output:
    """Fields by name or by key; a field that was not asked for is None and not among the keys.

    ``logits`` may be given as a function: it is called when they are first read, and never if nobody does. Engines
    that look into results for tensors (FSDP) read the fields below, so the property is none of them.
    """

    loss: Tensor | None  # mean over the targets
    hidden: Tensor | None  # (B, T, d): after the final norm
    loss_sum: Tensor | None  # the same loss before the division
    n_targets: Tensor | None  # what it is divided by
    cache: Cache | None  # the state after this call, if a cache was given
    _logits: Logits

    def __init__(
        self,
        loss: Tensor | None = None,
        logits: Logits = None,
        hidden: Tensor | None = None,
        loss_sum: Tensor | None = None,
        n_targets: Tensor | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.loss = loss
        self._logits = logits
        self.hidden = hidden
        self.loss_sum = loss_sum
        self.n_targets = n_targets
        self.cache = cache

    @property
    def logits(self) -> Tensor | None:
        """(B, T, V) for language models, (B, n_labels) for classification."""
        if callable(self._logits) and not isinstance(self._logits, Tensor):
            self._logits = self._logits()
        return self._logits

    @logits.setter
    def logits(self, value: Logits) -> None:
        self._logits = value

    def __getitem__(self, key: str) -> object:
        if key not in self.keys():
            raise KeyError(f"{key!r} is not in this output; it has {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.keys())})"

    def keys(self) -> list[str]:
        """The names of the fields that are set."""
        fields = {
            "loss": self.loss,
            "logits": self._logits,
            "hidden": self.hidden,
            "loss_sum": self.loss_sum,
            "n_targets": self.n_targets,
            "cache": self.cache,
        }
        return [name for name, value in fields.items() if value is not None]
