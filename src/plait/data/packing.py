"""Rows of training: the stream of all documents' tokens, cut into rows, in an order that is a pure
function.

The stream is a circle of n tokens, every document [bos] + tokens. Epoch e begins at a place that (seed, e)
draws and cuts n // T rows of T consecutive tokens from there; the n mod T tokens left over, fewer than one
row, rest in that epoch. No token is in two rows of an epoch, and none other is left out. The rows' order is
a keyed permutation. Sample g of a run is row g mod (n // T) of epoch g // (n // T), whatever the batch size
or the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from plait.config.errors import DataError
from plait.data.batch import IGNORED, Batch, power_of_two
from plait.data.permutation import Permutation, key_of
from plait.data.shards import TokenShards

Ids = npt.NDArray[np.int64]
_ORDER, _PLACE = 1, 2


@dataclass(frozen=True)
class Sample:
    """One row: tokens (T,), the places > 0 where a document begins, labels (T,) where they are not the
    tokens.
    """

    tokens: Ids
    starts: Ids
    labels: Ids | None = None

    def pieces(self, length: int) -> list[Sample]:
        """The row cut into rows of ``length`` tokens, the last of what is left."""
        cut = []
        for at in range(0, len(self.tokens), length):
            end = at + length
            inside = self.starts[(self.starts > at) & (self.starts < end)] - at
            labels = None if self.labels is None else self.labels[at:end]
            cut.append(Sample(self.tokens[at:end], inside, labels))
        return cut


class Samples(Protocol):
    """Rows by global sample index."""

    @property
    def count(self) -> int:
        """Rows in an epoch."""

    def sample(self, index: int) -> Sample:
        """Row of a global sample index: epoch index // count, place index % count in its order."""


class Rows:
    """The rows of a token shard; see the head of this file."""

    def __init__(
        self, shards: TokenShards, sequence_length: int, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        """Without shuffle every epoch begins at token 0 and keeps the stream's order. DataError below one
        row.
        """
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        if sequence_length < 2:
            raise DataError(f"data.sequence_length: {sequence_length} leaves nothing to predict; at least 2")
        self.count = shards.n_tokens // sequence_length
        if self.count == 0:
            raise DataError(
                f"the data has {shards.n_tokens} tokens, less than one row of data.sequence_length "
                f"{sequence_length}; give more text or a shorter sequence_length"
            )

    def begin(self, epoch: int) -> int:
        """The place in the stream where an epoch begins."""
        return key_of(self.seed, epoch, _PLACE) % self.shards.n_tokens if self.shuffle else 0

    def sample(self, index: int) -> Sample:
        """Row of a global sample index (0 or more)."""
        epoch, place = divmod(index, self.count)
        row = place
        if self.shuffle:
            row = int(Permutation(self.count, key_of(self.seed, epoch, _ORDER))(place))
        start = (self.begin(epoch) + row * self.sequence_length) % self.shards.n_tokens
        return self.cut(start, self.sequence_length)

    def cut(self, start: int, length: int) -> Sample:
        """Tokens start .. start + length - 1 of the stream, which goes on at its beginning."""
        end = self.shards.n_tokens
        here = min(length, end - start)
        tokens, starts = (
            self.shards.read(start, start + here),
            self.shards.starts(start, start + here) - start,
        )
        if here < length:
            tokens = np.concatenate([tokens, self.shards.read(0, length - here)])
            starts = np.concatenate([starts, self.shards.starts(0, length - here) + here])
        return Sample(tokens, starts[starts > 0])


@dataclass(frozen=True)
class Packer:
    """Rows to a Batch. `separate`: each document is its own sequence; else rows are one sequence each,
    joined.

    causal: whether the first token of a sequence is no target (the model predicts the next token). dense:
    joined rows of one length as (B, T), else packed too. pad_sequences: S rounded up to a power of two with empty
    sequences, and max_len to one (at most sequence_length), so that a compiled model sees few shapes.
    """

    sequence_length: int
    separate: bool = True
    causal: bool = True
    dense: bool = True
    pad_sequences: bool = True

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch of these rows."""
        tokens = np.concatenate([sample.tokens for sample in samples])
        labels = np.concatenate(
            [sample.tokens if sample.labels is None else sample.labels for sample in samples]
        )
        bounds = self._bounds(samples)
        targets = labels != IGNORED
        if self.causal:
            targets[bounds[:-1]] = False
        n_targets = int(targets.sum())
        length = len(samples[0].tokens)
        if self.dense and not self.separate and all(len(sample.tokens) == length for sample in samples):
            shape = (len(samples), length)
            return Batch(
                torch.from_numpy(tokens.reshape(shape)),
                torch.from_numpy(labels.reshape(shape)),
                tokens.size,
                n_targets,
            )
        longest = int(np.diff(bounds).max())
        if self.pad_sequences:
            longest = min(power_of_two(longest), self.sequence_length)
            empty = power_of_two(len(bounds) - 1) - (len(bounds) - 1)
            bounds = np.concatenate([bounds, np.full(empty, bounds[-1])])
        return Batch(
            torch.from_numpy(tokens)[None],
            torch.from_numpy(labels)[None],
            tokens.size,
            n_targets,
            torch.from_numpy(bounds.astype(np.int32)),
            longest,
        )

    def _bounds(self, samples: Sequence[Sample]) -> Ids:
        parts, at = [], 0
        for sample in samples:
            parts.append(np.array([at]))
            if self.separate:
                parts.append(sample.starts + at)
            at += len(sample.tokens)
        return np.concatenate([*parts, np.array([at])]).astype(np.int64)
