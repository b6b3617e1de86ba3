"""What may be asked of generation, checked once: the keywords of ``generate`` and its siblings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from plait.config.errors import ConfigError, nearest
from plait.inference.sampling import Sampling
from plait.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class GenerateOptions(Sampling):
    """How to generate: how a token is chosen (``Sampling``), where a row ends, how the work is done.

    max_new_tokens: at most so many tokens a row.
    stop: strings (or one) that end a row; they and what follows are cut from the output.
    eos_token_id: tokens that end a row; None: the tokenizer's eos and bos; an empty list: none.
    pad_token_id: fills a tensor after a row's end; None: the tokenizer's pad, else the end token, else 0.
    seed: row r draws with seed + r; a list holds a seed a prompt; None: seeds from torch's own generator.
    num_samples: continuations of each prompt; the prompt is run once.
    prefill_chunk: at most so many tokens of a prompt a call, which bounds the memory; None: the whole prompt.
    use_cache: False runs over the whole text for every token: slow, for comparison.
    graphs: on a CUDA device, record a step once and replay it; False launches its kernels one by one.
    add_bos: prompts given as text begin with the tokenizer's bos, as documents do in training.
    """

    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    seed: int | Sequence[int] | None = None
    num_samples: int = 1
    prefill_chunk: int | None = None
    use_cache: bool = True
    graphs: bool = True
    add_bos: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("max_new_tokens", self.max_new_tokens >= 0, "at least 0")
        self.require("num_samples", self.num_samples >= 1, "at least 1")
        chunk = self.prefill_chunk
        self.require("prefill_chunk", chunk is None or chunk >= 1, "at least 1, or None for the whole prompt")
        right = all(isinstance(s, str) and s for s in self.stops)
        self.require("stop", right, "a string or a list of strings, none of them empty")

    @staticmethod
    def of(options: dict[str, Any]) -> GenerateOptions:
        """From keywords; ConfigError for one that does not exist."""
        known = [f.name for f in fields(GenerateOptions)]
        for name in options:
            if name not in known:
                near = nearest(name, known)
                raise ConfigError(f"generate has no option {name!r}{near}; it has {', '.join(known)}")
        return GenerateOptions(**options)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def end_tokens(self, tokenizer: Tokenizer | None, vocab_size: int) -> frozenset[int]:
        """The tokens that end a row; ConfigError if one is outside the vocabulary."""
        given = self.eos_token_id
        if given is None:
            # a document's first token ends the one before it as well
            own = () if tokenizer is None else (tokenizer.eos_id, tokenizer.bos_id)
            given = [token for token in own if token is not None]
        ends = frozenset([given] if isinstance(given, int) else given)
        wrong = [token for token in ends if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(
                f"eos_token_id {wrong[0]} is outside the model's vocabulary 0 .. {vocab_size - 1}"
            )
        return ends

    def pad_token(self, tokenizer: Tokenizer | None, ends: frozenset[int]) -> int:
        """What stands after a row's end in a tensor."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        if tokenizer is not None and tokenizer.pad_id is not None:
            return tokenizer.pad_id
        return min(ends, default=0)

    def seeds(self, n_prompts: int) -> list[int]:
        """A seed a row; sample j of a prompt with a seed of its own draws with that seed + j."""
        n_rows = n_prompts * self.num_samples
        if self.seed is None:
            drawn: list[int] = torch.randint(2**62, (n_rows,)).tolist()
            return drawn
        if isinstance(self.seed, int):
            return [self.seed + row for row in range(n_rows)]
        if len(self.seed) != n_prompts:
            raise ConfigError(
                f"seed holds {len(self.seed)} numbers for {n_prompts} prompts; give one each, or one number"
            )
        return [seed + j for seed in self.seed for j in range(self.num_samples)]
