"""From logits to the next token: pure functions on logits (S, V), S rows that know nothing of each other.

Order of composition: repetition penalty, temperature, top-k, top-p, min-p; each works on what the one before
left, and what it rules out becomes -inf. The token is then drawn by inverting the cumulated distribution at
one uniform number a row, from a generator of the row's own: no row's tokens depend on the rest of the batch.
Sources: arXiv 1909.05858 (repetition penalty), 1805.04833 (top-k), 1904.09751 (top-p), 2407.01082 (min-p).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.config.errors import ConfigError

INVALID = -1  # stands for the token of a row whose logits are not finite
_BLOCK = 64  # uniform numbers a row drawn at once: one transfer to the device for so many steps


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the defaults draw from the model's own distribution.

    temperature: 0 is greedy, the most probable token.
    top_k: only the k most probable tokens. top_p: only the most probable ones that together reach p.
    min_p: only tokens at least p times as probable as the most probable one.
    repetition_penalty: above 1 makes tokens less probable that the row, its prompt included, already holds.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        heat, penalty = self.temperature, self.repetition_penalty
        self.require("temperature", math.isfinite(heat) and heat >= 0, "a number from 0 (greedy) on")
        self.require("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for all tokens")
        self.require("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, or None")
        self.require("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1, or None")
        self.require("repetition_penalty", math.isfinite(penalty) and penalty > 0, "above 0 (1: none)")

    def require(self, name: str, fits: bool, allowed: str) -> None:
        """Raise ConfigError with what is allowed unless the option fits."""
        if not fits:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether the tokens that a row already holds matter."""
        return self.repetition_penalty != 1


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (S, V) of tokens ``seen`` (S, V; bool) divided by the penalty if positive, else multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def heat(logits: Tensor, temperature: float) -> Tensor:
    """Logits (S, V) over a temperature above 0, the greatest moved to 0 first so that nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k greatest of logits (S, V) become -inf; no more than k stay if some are equal."""
    if k >= logits.shape[-1]:
        return logits
    values, index = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The most probable tokens whose probabilities first add up to p stay, at least one; logits (S, V)."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # exactly 0 for the first one
    kept = ordered.masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, kept)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens less probable than p times the row's most probable one become -inf; logits (S, V)."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def shape_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k, top-p and min-p, in this order, on logits (S, V); the temperature is not 0."""
    logits = heat(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row (S,) from softmax(logits (S, V)), at the numbers ``uniform`` (S,) of [0, 1)."""
    probability = logits.softmax(-1)
    reached = probability.cumsum(-1, dtype=_wide(logits.device))
    total = reached[..., -1:]
    wanted = uniform.to(reached)[:, None] * total
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    # the first token that passes the number; never one of probability 0, though parallel sums need not be monotone
    return ((reached > wanted) & (probability > 0)).int().argmax(-1)


def sample(
    logits: Tensor, sampling: Sampling, *, uniform: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """The next token of each row (S,) from logits (S, V).

    ``uniform`` (S,) is needed unless greedy, ``seen`` (S, V; bool) for a repetition penalty. A row whose
    logits are not finite gives ``INVALID`` and no token: the caller, who reads the tokens anyway, raises.
    """
    if sampling.greedy and not sampling.penalizes:
        greatest, ids = logits.max(-1)
        return _or_invalid(ids, greatest)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    greatest = logits.amax(-1)
    if sampling.penalizes:
        assert seen is not None
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        ids = logits.argmax(-1)
    else:
        assert uniform is not None
        ids = draw(shape_distribution(logits, sampling), uniform)
    return _or_invalid(ids, greatest)


def _or_invalid(ids: Tensor, greatest: Tensor) -> Tensor:
    """ids (S,), INVALID where the greatest logit (S,) is not finite; that of anything with a NaN is NaN.

    In few operations: each is a kernel of every step. A number is finite if it leaves nothing less itself.
    """
    return torch.where(greatest - greatest == 0, ids, INVALID)


class Uniforms:
    """A stream of numbers of [0, 1) for each row, from a generator seeded for that row alone.

    The numbers are made on the host, so that a seed means the same on every device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds]
        self._device = torch.device(device)
        self._block = torch.empty(0, len(seeds))
        self._next = 0

    def next(self) -> Tensor:
        """(S,): the next number of each row."""
        if self._next == self._block.shape[0]:
            columns = [torch.rand(_BLOCK, generator=g, dtype=torch.float64) for g in self._generators]
            block = torch.stack(columns, 1) if columns else torch.empty(_BLOCK, 0)
            self._block, self._next = block.to(self._device, _wide(self._device)), 0
        self._next += 1
        return self._block[self._next - 1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, each with its own stream."""
        self._generators = [self._generators[row] for row in rows]
        self._block = self._block[:, list(rows)]


def _wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it: float32 sums over a large vocabulary lose its rarest tokens."""
    return torch.float32 if device.type == "mps" else torch.float64
