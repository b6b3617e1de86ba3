"""Minimal pairs, as BLiMP asks them (arXiv 1912.00582): is the good sentence likelier than the bad one?

Compared are total log-probabilities, as BLiMP does: a mean over tokens would reward whatever has more tokens. A tie
counts half, so a model that cannot tell anything apart scores one half and not one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.config.errors import DataError
from plait.evaluation.surprisal import surprisals
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in what is tested, and the name of the test."""

    good: str
    bad: str
    group: str = ""


@dataclass(frozen=True)
class PairScore:
    """What a pair cost: bits of either sentence."""

    pair: MinimalPair
    good_bits: float
    bad_bits: float

    @property
    def points(self) -> float:
        """1 if the good sentence is likelier, one half if both are equally so, else 0."""
        return 0.5 if self.good_bits == self.bad_bits else float(self.good_bits < self.bad_bits)


def read_pairs(path: str | Path) -> list[MinimalPair]:
    """The pairs of a JSONL file with sentence_good, sentence_bad and, if there is one, UID (BLiMP's own keys).

    DataError names the line that is not such a pair.
    """
    path, pairs = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            pair = MinimalPair(item["sentence_good"], item["sentence_bad"], item.get("UID", path.stem))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(
                f"{path}, line {number}: expected an object with sentence_good and sentence_bad; got {line[:80]!r}"
            ) from None
        if not all(isinstance(text, str) for text in (pair.good, pair.bad, pair.group)):
            raise DataError(f"{path}, line {number}: sentence_good, sentence_bad and UID must be text")
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path} holds no pairs")
    return pairs


def score_pairs(
    model: Model, pairs: Sequence[MinimalPair], *, tokenizer: Tokenizer | None = None
) -> list[PairScore]:
    """The cost of both sentences of every pair, each as a document of its own."""
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    bits = [found.bits for found in surprisals(model, texts, tokenizer=tokenizer)]
    return [PairScore(pair, good, bad) for pair, good, bad in zip(pairs, bits[::2], bits[1::2], strict=True)]


def accuracies(scores: Iterable[PairScore]) -> dict[str, float]:
    """The mean of the points by group, groups in order of their names."""
    points = defaultdict(list)
    for score in scores:
        points[score.pair.group].append(score.points)
    return {group: sum(points[group]) / len(points[group]) for group in sorted(points)}
