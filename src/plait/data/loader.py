"""Batches for training and evaluation. A loader's whole state is one integer: the next global sample index.

Batch b of a run is samples b * batch_rows .. (b + 1) * batch_rows - 1, over the ends of epochs too; process
r of w takes rows r, r + w, r + 2 w, ... of it. So the batches of a run are the same for every number of
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from plait.config.errors import DataError
from plait.data.batch import IGNORED, Batch
from plait.data.masking import MaskedRows
from plait.data.packing import Packer, Rows, Sample, Samples

Collate = Callable[[Sequence[Sample]], Batch]


class Loader:
    """An endless iterator of Batches of this process; set `index` to go anywhere, save it to resume."""

    def __init__(
        self,
        samples: Samples,
        batch_rows: int,
        collate: Collate,
        *,
        rank: int = 0,
        world: int = 1,
        index: int = 0,
    ) -> None:
        """batch_rows: rows of the global batch, at least one for each of the `world` processes."""
        if not 0 <= rank < world or batch_rows < world:
            raise DataError(
                f"a batch of {batch_rows} rows for process {rank} of {world}: every process needs at least "
                "one row; raise training.batch_tokens or lower data.sequence_length"
            )
        self.samples = samples
        self.batch_rows = batch_rows
        self.collate = collate
        self.rank = rank
        self.world = world
        self.index = index

    @property
    def epoch(self) -> float:
        """How many times the data has been gone through, as a fraction."""
        return self.index / self.samples.count

    def micro_batches(self, rows: int | None = None, length: int | None = None) -> list[Batch]:
        """This process's part of the next global batch, in pieces of at most `rows` rows (None: in one),
        and go on.

        length: each row is cut into sequences of so many tokens. Which tokens a batch has does not depend on it.
        """
        mine = range(self.index + self.rank, self.index + self.batch_rows, self.world)
        step = len(mine) if rows is None else max(1, rows)
        batches = []
        for at in range(0, len(mine), step):
            samples = [self.samples.sample(i) for i in mine[at : at + step]]
            if length is not None:
                samples = [piece for sample in samples for piece in sample.pieces(length)]
            batches.append(self.collate(samples))
        self.index += self.batch_rows
        return batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.micro_batches()[0]


def evaluation_batches(
    rows: Rows,
    batch_rows: int,
    *,
    masking: MaskedRows | None = None,
    separate: bool = True,
    tokens: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Packed batches in which every token but the first of each document (with `separate`) is a target
    exactly once.

    Rows lie in the stream's order and overlap by the one token that only serves as context; the last is
    shorter. Masked rows do not overlap. tokens: stop after about so many. Every process gets equally many
    batches: one that has no row left gets a batch without targets.
    """
    end = rows.shards.n_tokens if tokens is None else min(tokens, rows.shards.n_tokens)
    causal = masking is None
    length = rows.sequence_length
    packer = Packer(length, separate=separate, causal=causal, dense=False)
    stride = length - 1 if causal else length
    # A last row of one token would have no target of its own.
    starts = range(0, max(1, end - 1 if causal else end), stride)
    for at in range(0, len(starts), batch_rows):
        group = starts[at : at + batch_rows][rank::world]
        samples = []
        for start in group or starts[:1]:
            one = rows.cut(start, min(length, end - start))
            samples.append(one if masking is None else masking.mask(one, 0, start // stride))
        batch = packer(samples)
        yield batch if group else without_targets(batch)


def without_targets(batch: Batch) -> Batch:
    """The same batch with nothing to predict, for a process that must only keep step with the others."""
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED), n_targets=0)
