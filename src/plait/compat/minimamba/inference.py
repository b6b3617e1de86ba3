"""The memory of a model between calls: MiniMamba's InferenceParams over Plait's cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plait.config.errors import BuildError
from plait.models.cache import Cache
from plait.models.model import Model

MB = 1 << 20
_NAMES = {"conv": "conv_state", "ssm": "ssm_state"}


class InferenceParams:
    """What a model remembers of at most ``max_batch_size`` rows of at most ``max_sequence_len`` tokens each.

    It belongs to the model that it is first given to, which fills it, and counts the tokens it has read.
    """

    def __init__(
        self,
        cache: dict[str, Tensor] | None = None,
        seqlen_offset: int = 0,
        max_sequence_len: int = 2048,
        max_batch_size: int = 1,
    ) -> None:
        if cache or seqlen_offset:
            raise BuildError("InferenceParams begins empty: a model fills it")
        self.max_sequence_len, self.max_batch_size = max_sequence_len, max_batch_size
        self._model: Model | None = None
        self._cache: Cache | None = None

    @property
    def cache(self) -> dict[str, Tensor]:
        """The states by name and layer: conv_state_0 (B, taps - 1, E), ssm_state_0 (B, E, N), ..."""
        states = [] if self._cache is None else self._cache.states
        return {
            f"{_NAMES.get(name, name)}_{layer}": tensor
            for layer, state in enumerate(states)
            for name, tensor in state.items()
        }

    @property
    def seqlen_offset(self) -> int:
        """Tokens of each row so far; of the longest, if an attention_mask made them differ."""
        return 0 if self._cache is None else max(self._cache.lengths, default=0)

    @seqlen_offset.setter
    def seqlen_offset(self, value: int) -> None:
        if value != self.seqlen_offset:
            raise BuildError(
                f"seqlen_offset is {self.seqlen_offset}, counted by the model as it reads; it cannot be set to "
                f"{value}: leave `seqlen_offset += 1` out, or call reset_cache()"
            )

    def reset_cache(self) -> None:
        """Forget everything."""
        self._model = self._cache = None

    def get_cache_info(self) -> dict[str, Any]:
        """cached_layers, total_tensors, memory_mb (2^20 bytes), seqlen_offset."""
        states = [] if self._cache is None else self._cache.states
        return {
            "cached_layers": len(states),
            "total_tensors": sum(map(len, states)),
            "memory_mb": 0.0 if self._cache is None else self._cache.nbytes / MB,
            "seqlen_offset": self.seqlen_offset,
        }

    def attached(self, model: Model, rows: int) -> Cache:
        """The model's cache for ``rows`` sequences, made at the first call; BuildError for another model."""
        if self._cache is None:
            if rows > self.max_batch_size:
                raise BuildError(
                    f"{rows} rows were given, but max_batch_size is {self.max_batch_size}: make "
                    f"InferenceParams(max_batch_size={rows})"
                )
            self._model, self._cache = model, model.new_cache(rows, self.max_sequence_len)
        elif self._model is not model:
            raise BuildError("these InferenceParams belong to another model: make new ones, or reset_cache()")
        return self._cache

    def keep(self, cache: Cache) -> None:
        """What the model has made of it; no gradient goes back through it."""
        self._cache = cache.detach()
