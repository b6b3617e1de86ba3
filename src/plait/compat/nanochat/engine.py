"""nanochat's Engine and its KVCache over Plait's: any number of samples of a prompt, with the calculator as a tool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from plait.compat.nanochat.gpt import GPT
from plait.compat.nanochat.tokenizer import RustBPETokenizer
from plait.config.errors import BuildError
from plait.inference.chat import ChatEngine
from plait.inference.tools import calculate
from plait.models.cache import Cache
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer

use_calculator = calculate


class KVCache:
    """The memory of a GPT while it generates: keys and values of its attention, states of its Mamba.

    ``batch_size`` rows of at most ``seq_len`` tokens. It belongs to the GPT that it is first given to; ``num_heads``
    (of keys and values), ``head_dim`` and ``num_layers`` must be that GPT's.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int) -> None:
        self.batch_size, self.seq_len = batch_size, seq_len
        self._wanted = {"num_heads": num_heads, "head_dim": head_dim, "num_layers": num_layers}
        self._model: Model | None = None
        self.cache: Cache | None = None

    @property
    def pos(self) -> int:
        """Tokens of each row so far."""
        return 0 if self.cache is None else max(self.cache.lengths, default=0)

    def get_pos(self) -> int:
        """``pos``."""
        return self.pos

    def reset(self) -> None:
        """Forget everything."""
        self.cache = None

    def prefill(self, other: KVCache) -> None:
        """Go on from what ``other``, a cache of one row, holds, in every row of this one, which must be empty."""
        if self.pos or other.cache is None or other._model is None:
            raise BuildError("prefill fills an empty cache from one that a GPT has written")
        if other.batch_size not in (1, self.batch_size):
            raise BuildError(f"prefill: {other.batch_size} rows do not become {self.batch_size}")
        if other.pos > self.seq_len:
            raise BuildError(f"prefill: {other.pos} tokens do not fit in a cache of {self.seq_len}")
        rows = range(self.batch_size) if other.batch_size == self.batch_size else [0] * self.batch_size
        self.cache = _widened(other._model, other.cache.select(list(rows)), self.seq_len)
        self._model = other._model

    def attached(self, model: Model) -> Cache:
        """The model's cache, made at the first call; BuildError for another model, or one of another shape."""
        if self._model is None:
            self._check(model)
            self._model = model
        elif self._model is not model:
            raise BuildError("this KVCache belongs to another GPT; make a new one")
        if self.cache is None:
            self.cache = model.new_cache(self.batch_size, self.seq_len)
        return self.cache

    def _check(self, model: Model) -> None:
        attention = next(
            (layer.options for layer in model.config.layers() if layer.kind == "attention"), None
        )
        found: dict[str, Any] = {"num_layers": len(model.blocks)}
        if attention is not None:
            mixer: Any = next(block.mixer for block in model.blocks if block.kind == "attention")
            found |= {"num_heads": mixer.n_kv_head, "head_dim": mixer.headdim}
        for name, value in found.items():
            if self._wanted[name] != value:
                raise BuildError(f"KVCache: {name} is {self._wanted[name]}, but the GPT's is {value}")


def _widened(model: Model, cache: Cache, capacity: int) -> Cache:
    """The same memory in a cache of another capacity: position p of a ring of R slots lies in slot p mod R."""
    wide = model.new_cache(cache.n_seq, capacity)
    length = max(cache.lengths, default=0)
    for old, new in zip(cache.states, wide.states, strict=True):
        for name, tensor in new.items():
            if old[name].shape == tensor.shape:
                tensor.copy_(old[name])
                continue
            held = min(length, old[name].shape[1], tensor.shape[1])
            places = torch.arange(length - held, length, device=tensor.device)
            tensor[:, places % tensor.shape[1]] = old[name][:, places % old[name].shape[1]]
    wide.positions.copy_(cache.positions)
    wide.lengths = list(cache.lengths)
    return wide


class Engine:
    """Continues prompts of ids with a GPT, calling the calculator where the model asks for it."""

    def __init__(self, model: GPT, tokenizer: RustBPETokenizer | Tokenizer) -> None:
        """TokenizerError if the tokenizer has no chat tokens."""
        self.model = model
        self.tokenizer = tokenizer
        own = tokenizer.tokenizer if isinstance(tokenizer, RustBPETokenizer) else tokenizer
        self._engine = ChatEngine(model.model, own)

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """(one token of each sample, their masks: 1 drawn, 0 forced by the tool), step by step.

        ``max_tokens`` None: until all samples have ended, or ``sequence_len`` is full.
        """
        room = max(1, self.model.config.sequence_len - len(tokens))
        return self._engine.generate(
            tokens,
            num_samples,
            max_tokens=room if max_tokens is None else max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(whole samples with the prompt, their masks), end tokens left out; ``options`` as for ``generate``."""
        room = max(1, self.model.config.sequence_len - len(tokens))
        if options.get("max_tokens") is None:
            options["max_tokens"] = room
        return self._engine.generate_batch(tokens, num_samples, **options)
