"""Texts to shards of raw bytes: files ``shard_00000.bin`` of documents, each followed by one separator byte.

What is written is read back by ``data.format: bytes`` with ``data.separator``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from plait.config.errors import DataError
from plait.data.documents import Document
from plait.tokenizers.base import to_bytes
from plait.tokenizers.files import new_folder


@dataclass(frozen=True)
class Packed:
    """What was written, by how many."""

    files: int
    documents: int
    bytes: int


def pack_bytes(
    documents: Iterable[Document],
    folder: Path,
    separator: int,
    shard_bytes: int = 1 << 26,
    progress: Callable[[int], None] | None = None,
) -> Packed:
    """Write documents into a new folder, a new file wherever one has ``shard_bytes``; a document is never cut.

    DataError if the folder is there already, if a text holds the separator, or if there is no text; then nothing
    is left behind.
    """
    if folder.exists():
        raise DataError(f"{folder} is there already; give another folder, or remove it")
    end, count, total = bytes([separator]), 0, 0
    with new_folder(folder) as temporary, _Shards(temporary, shard_bytes) as shards:
        for document in documents:
            text = to_bytes(document.text)
            if end in text:
                raise DataError(
                    f"{document.name} holds the byte {separator} that is to end documents; choose a separator "
                    "that no text holds"
                )
            if text and not document.continues:
                if count:
                    shards.write(end)
                shards.begin()
                count += 1
            shards.write(text)
            total += len(text)
            if progress is not None:
                progress(total)
        if not count:
            raise DataError("there is no text to pack")
        shards.write(end)
    return Packed(shards.files, count, total)


class _Shards:
    """Files written one after another; ``begin`` says where a new one may be begun."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._file: IO[bytes] | None = None
        self._filled = self.files = 0

    def begin(self) -> None:
        if self._file is None or self._filled >= self._most:
            self._close()
            self._file = (self._folder / f"shard_{self.files:05d}.bin").open("wb")
            self.files, self._filled = self.files + 1, 0

    def write(self, data: bytes) -> None:
        if data:
            assert self._file is not None
            self._filled += self._file.write(data)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
