"""Texts with labels: rows that are whole documents, cut to the sequence length, and padded batches of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plait.config.errors import DataError
from plait.data.batch import Batch
from plait.data.packing import Sample
from plait.data.permutation import Permutation, key_of
from plait.data.shards import TokenShards

_ORDER = 1
_PAD_TO_MULTIPLE = 8


class Examples:
    """The documents of a shard with labels, in an order that is a pure function of (seed, epoch); none is
    left out.
    """

    def __init__(
        self, shards: TokenShards, sequence_length: int, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        """A longer document keeps its beginning. DataError if the shard has no labels."""
        if shards.labels is None:
            raise DataError(f"{shards.folder} has no labels; classification needs data with a label field")
        self.labels = shards.labels
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.count = shards.n_documents

    def sample(self, index: int) -> Sample:
        """Document of a global sample index; labels (1,), float64."""
        epoch, place = divmod(index, self.count)
        number = place
        if self.shuffle:
            number = int(Permutation(self.count, key_of(self.seed, epoch, _ORDER))(place))
        start, stop = int(self.shards.bounds[number]), int(self.shards.bounds[number + 1])
        tokens = self.shards.read(start, min(stop, start + self.sequence_length))
        return Sample(tokens, np.empty(0, dtype=np.int64), self.labels[number : number + 1])

    def check_labels(self, num_labels: int) -> None:
        """DataError unless the labels are classes 0 .. num_labels - 1 (anything goes for num_labels 1:
        regression).
        """
        if num_labels == 1:
            return
        wrong = self.labels[(self.labels < 0) | (self.labels >= num_labels) | (self.labels % 1 != 0)]
        if wrong.size:
            raise DataError(
                f"{self.shards.folder}: label {wrong[0]:g} is not one of the classes 0 .. {num_labels - 1} "
                "of model.head.num_labels"
            )


@dataclass(frozen=True)
class Padder:
    """Rows of different lengths to one padded Batch; labels int64 (B,), or float32 for regression."""

    pad_id: int = 0
    regression: bool = False
    sequence_length: int | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """input_ids and attention_mask (B, T), padded on the right to a multiple of 8 (at most
        sequence_length).
        """
        longest = max(len(sample.tokens) for sample in samples)
        width = -(-longest // _PAD_TO_MULTIPLE) * _PAD_TO_MULTIPLE
        if self.sequence_length is not None:
            width = min(width, max(longest, self.sequence_length))
        ids = np.full((len(samples), width), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.tokens)] = sample.tokens
            mask[row, : len(sample.tokens)] = 1
        labels = np.concatenate([sample.labels for sample in samples if sample.labels is not None])
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(labels.astype(np.float32 if self.regression else np.int64)),
            int(mask.sum()),
            len(samples),
            attention_mask=torch.from_numpy(mask),
        )
