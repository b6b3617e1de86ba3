"""Token shards: a corpus as token ids in a memory-mapped file, with the bounds of its documents.

A folder of `tokens.bin` (uint16, or uint32 for more than 65536 ids), `documents.bin` (uint64: where each
document begins, and the end of the last), for classification `labels.bin` (float64), and `index.json`,
which says what they are and how long, so that a truncated file or another tokenizer's shard is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.config.errors import DataError
from plait.tokenizers.base import Tokenizer, token_dtype

VERSION = 1
INDEX = "index.json"
TOKENS, DOCUMENTS, LABELS = "tokens.bin", "documents.bin", "labels.bin"


class ShardWriter:
    """Writes the files of a shard into a folder that exists; `close` writes the index, without which it is
    no shard.
    """

    def __init__(self, folder: Path, vocab_size: int, tokenizer: str) -> None:
        """tokenizer: the fingerprint of what made the ids."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._tokens = (folder / TOKENS).open("wb")
        self._bounds = (folder / DOCUMENTS).open("wb")
        self.n_tokens = self.n_documents = self.n_bytes = 0

    def add(self, ids: npt.ArrayLike, n_bytes: int = 0, *, continues: bool = False) -> None:
        """Append a document, or more of the last one; n_bytes of text. DataError for an id outside the
        vocabulary.
        """
        array = np.asarray(ids)
        if array.size and not (int(array.min()) >= 0 and int(array.max()) < self._vocab_size):
            wrong = array[(array < 0) | (array >= self._vocab_size)][0]
            raise DataError(f"token id {wrong} is outside the vocabulary 0 .. {self._vocab_size - 1}")
        if not continues:
            self._bounds.write(np.uint64(self.n_tokens).tobytes())
            self.n_documents += 1
        self._tokens.write(array.astype(self._dtype).tobytes())
        self.n_tokens += array.size
        self.n_bytes += n_bytes

    def close(self, labels: npt.NDArray[np.float64] | None = None, **more: Any) -> None:
        """Finish the files and write the index; one label a document, if any; `more` goes into the index."""
        self._bounds.write(np.uint64(self.n_tokens).tobytes())
        self.abort()
        files = {TOKENS: self.n_tokens * self._dtype.itemsize, DOCUMENTS: 8 * (self.n_documents + 1)}
        if labels is not None:
            (self._folder / LABELS).write_bytes(labels.tobytes())
            files[LABELS] = 8 * len(labels)
        index = {
            "version": VERSION,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "tokenizer": self._tokenizer,
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "bytes": self.n_bytes,
            "files": files,
            **more,
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def abort(self) -> None:
        """Close the files as they are."""
        self._tokens.close()
        self._bounds.close()


class TokenShards:
    """A shard on disk, read through a memory map."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Open a folder; DataError if it is no shard, a file is truncated, or `tokenizer` did not make it."""
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["version"] != VERSION:
                raise DataError(
                    f"{path}: version {index['version']}, this Plait reads {VERSION}; prepare the data again"
                )
            self.dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[index["dtype"]])
            self.n_tokens, self.n_documents = int(index["tokens"]), int(index["documents"])
            self.n_bytes, self.vocab_size = int(index["bytes"]), int(index["vocab_size"])
            self.tokenizer: str = index["tokenizer"]
            self.classes: list[str] | None = index.get("classes")
            files: dict[str, int] = dict(index["files"])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged ({error!r}); delete the folder and prepare the data again"
            ) from error
        for name, size in files.items():
            self._check_size(self.folder / name, size)
        if tokenizer is not None and tokenizer.fingerprint() != self.tokenizer:
            raise DataError(
                f"{self.folder} was made with another tokenizer (fingerprint {self.tokenizer[:12]}, "
                f"this one is {tokenizer.fingerprint()[:12]}); prepare the data again"
            )
        self.tokens = self._map(TOKENS, self.dtype)
        self.bounds = self._map(DOCUMENTS, np.dtype(np.uint64))
        self.labels = self._map(LABELS, np.dtype(np.float64)) if LABELS in files else None

    @staticmethod
    def _check_size(path: Path, size: int) -> None:
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(f"{path} {state}; delete the folder and prepare the data again")

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path = self.folder / name
        # An empty file cannot be mapped.
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens start .. stop - 1 as int64; DataError for one outside the vocabulary (the file was
        changed).
        """
        ids = self.tokens[start:stop].astype(np.int64)
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder / TOKENS} holds token id {int(ids.max())}, outside the vocabulary 0 .. "
                f"{self.vocab_size - 1}; delete the folder and prepare the data again"
            )
        return ids

    def document(self, number: int) -> npt.NDArray[np.int64]:
        """The tokens of one document, its bos among them."""
        return self.read(int(self.bounds[number]), int(self.bounds[number + 1]))

    def starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where documents begin among the tokens start .. stop - 1 (places in the stream)."""
        low, high = np.searchsorted(self.bounds, np.array([start, stop], dtype=np.uint64))
        return self.bounds[low:high].astype(np.int64)

    def check_vocabulary(self, vocab_size: int) -> None:
        """DataError unless a model of so many ids can read these tokens."""
        if self.vocab_size > vocab_size:
            raise DataError(
                f"{self.folder} has token ids up to {self.vocab_size - 1}, the model's vocabulary is "
                f"{vocab_size}; leave model.vocab_size out, or use the tokenizer the model was made for"
            )


def write_shards(
    folder: str | Path, documents: Sequence[npt.ArrayLike], vocab_size: int, tokenizer: str = ""
) -> TokenShards:
    """A shard of given ids, one array a document, written into a folder (made if needed): for synthetic
    data.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(path, vocab_size, tokenizer)
    try:
        for ids in documents:
            writer.add(ids)
        writer.close()
    finally:
        writer.abort()
    return TokenShards(path)
