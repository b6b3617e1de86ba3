"""How well something was predicted: sums, which may be added over batches and processes, and their ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The cost of predictions: ``nats`` over ``n_targets`` tokens that stand for ``n_bytes`` bytes."""

    nats: float = 0.0
    n_targets: int = 0
    n_bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.n_targets + other.n_targets, self.n_bytes + other.n_bytes)

    @property
    def loss(self) -> float:
        """Nats a token; NaN if nothing was predicted."""
        return self.nats / self.n_targets if self.n_targets else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss): among how many equally probable tokens the model might as well have guessed."""
        return math.exp(self.loss) if self.loss < 700 else math.inf if self.n_targets else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text, which may be compared across tokenizers; NaN if the bytes are not known."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan
