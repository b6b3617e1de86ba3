"""BitByte's data: files ``shard_*.bin`` of raw bytes as rows of ids, for torch's DataLoader."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from plait.config.errors import DataError
from plait.data.packing import Rows
from plait.data.shards import TokenShards

PATTERN = "shard_*.bin"


class ByteShards(TokenShards):
    """All files of a folder as one stream of bytes, read where they lie."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = sorted(self.folder.glob(PATTERN))
        if not self._files:
            raise DataError(f"{folder} holds no {PATTERN}: make some with plait data pack TEXTS --out FOLDER")
        self._begins = [0, *accumulate(path.stat().st_size for path in self._files)]
        self.n_tokens, self.n_documents, self.vocab_size = self._begins[-1], len(self._files), 256
        self.bounds = np.array(self._begins, dtype=np.uint64)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Bytes start .. stop - 1 of the stream as int64."""
        parts = []
        for path, begin, end in zip(self._files, self._begins, self._begins[1:], strict=False):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                # opened anew each time, so that a DataLoader's workers share nothing
                parts.append(np.fromfile(path, np.uint8, high - low, offset=low - begin))
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


class ByteShardDataset(Dataset[Tensor]):
    """Rows (seq_len,) of ids; row i is a pure function of seed and i, so workers and resumed runs agree.

    In an epoch each byte is in one row, but for fewer than seq_len that rest. Process ``rank`` of ``world`` has
    every world-th row. ``shuffle`` False keeps the stream's order.
    """

    def __init__(
        self,
        path: str | Path,
        seq_len: int = 8192,
        *,
        seed: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ) -> None:
        if not 0 <= rank < world or epochs < 1:
            raise DataError(f"rank {rank} of {world} processes over {epochs} epochs makes no sense")
        self.rows = Rows(ByteShards(path), seq_len, seed=seed, shuffle=shuffle)
        self.rank, self.world = rank, world
        self._count = self.rows.count * epochs // world

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Row ``index``, int64."""
        if not 0 <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        return torch.from_numpy(self.rows.sample(index * self.world + self.rank).tokens)
