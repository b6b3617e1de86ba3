"""From a corpus to a token shard, once: the folder's name says all that the tokens depend on, so it is
found again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from plait.config.data import DataConfig
from plait.config.errors import DataError
from plait.config.machine import cache_folder
from plait.data.documents import Document, documents_of
from plait.data.shards import VERSION, ShardWriter, TokenShards
from plait.data.sources import Source, Split, by_last_file, resolve_sources
from plait.tokenizers.base import Tokenizer, to_bytes
from plait.tokenizers.files import new_folder

Shards = TypeVar("Shards", bound=TokenShards)
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20


def prepare(
    spec: str | Sequence[str],
    tokenizer: Tokenizer,
    *,
    cache: str | Path | None = None,
    format: str = "auto",
    field: str = "text",
    split: Split = "all",
    fraction: float = 0.0,
    eos: bool = False,
    label_field: str | None = None,
    classes: Sequence[str] | None = None,
    separator: int | None = None,
    validation_split: Literal["documents", "last_file"] = "documents",
    progress: Callable[[int], None] | None = None,
) -> TokenShards:
    """The token shard of a corpus (or of its train or validation split), made if it is not there yet.

    Every document is [bos] + tokens (+ [eos]). label_field: a JSONL or Parquet field with one label a
    document, a number or the name of a class; classes: the names in order, so that validation agrees with
    training. separator, validation_split: see read_documents. progress is called with the bytes of text done
    so far. DataError if there is no text, or it cannot be written.
    """
    sources = resolve_sources(spec, format, separator)
    if validation_split == "last_file" and split != "all":
        sources, split, fraction = by_last_file(sources, split), "all", 0.0
    key = shard_key(sources, tokenizer, field, split, fraction, eos, label_field, classes)
    folder = cache_folder(cache) / f"tokens-{key}"
    if not folder.is_dir():
        documents = documents_of(sources, field, split=split, fraction=fraction, label_field=label_field)
        first = next((document for document in documents if document.text), None)
        if first is None:
            if split == "all":
                raise DataError(f"data: {shown(spec)} holds no text")
            raise DataError(
                f"data: of {shown(spec)}, data.validation_fraction {fraction:g} leaves no document for "
                f"{split}; change it, or name files in data.validation"
            )
        with new_shard(folder, tokenizer) as (_, writer):
            labels = _write(writer, chain([first], documents), tokenizer, eos, progress)
            numbers, names = (None, None) if label_field is None else _numbers(labels, classes)
            writer.close(numbers, classes=names, sources=shown(spec), split=split)
    return TokenShards(folder, tokenizer)


@contextmanager
def new_shard(folder: Path, tokenizer: Tokenizer) -> Iterator[tuple[Path, ShardWriter]]:
    """A writer, and the temporary folder that becomes ``folder`` at the end of the block; DataError if it cannot."""
    try:
        with new_folder(folder) as temporary:
            writer = ShardWriter(temporary, tokenizer.vocab_size, tokenizer.fingerprint())
            try:
                yield temporary, writer
            finally:
                writer.abort()
    except OSError as error:
        raise DataError(f"token shards cannot be written to {folder}: {error.strerror or error}") from error


def shown(spec: str | Sequence[str]) -> str:
    """Sources in words."""
    return spec if isinstance(spec, str) else ", ".join(spec)


def shard_key(sources: Iterable[Source], tokenizer: Tokenizer, *options: Any) -> str:
    """The name of what these files, this tokenizer and these options make."""
    parts = [VERSION, [source.signature() for source in sources], tokenizer.fingerprint(), options]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents with text, some at a time: enough for a tokenizer to work in parallel, never a whole
    corpus.
    """
    batch: list[Document] = []
    size = 0
    for document in documents:
        if document.text:
            batch.append(document)
            size += len(document.text)
            if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write(
    writer: ShardWriter,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    eos: bool,
    progress: Callable[[int], None] | None,
) -> list[Any]:
    """Encode and write all documents; their labels."""
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None or (eos and tokenizer.eos_id is None):
        raise DataError(
            f"the {tokenizer.type} tokenizer has no {'eos' if start is not None else 'bos or eos'} token to "
            "mark documents with; name one in tokenizer.special_tokens"
        )
    labels: list[Any] = []
    end = np.array([tokenizer.eos_id] if eos else [], dtype=np.int64)
    is_open = False
    for batch in _batches(documents):
        encoded = tokenizer.encode_arrays(document.text for document in batch)
        for document, ids in zip(batch, encoded, strict=True):
            if not document.continues:
                if is_open:
                    writer.add(end, continues=True)
                writer.add([start])
                labels.append(document.label)
                is_open = True
            writer.add(ids, len(to_bytes(document.text)), continues=True)
        if progress is not None:
            progress(writer.n_bytes)
    writer.add(end, continues=True)
    return labels


def _numbers(
    labels: list[Any], classes: Sequence[str] | None
) -> tuple[npt.NDArray[np.float64], list[str] | None]:
    """Labels as numbers: numbers as they are, names by their place among the classes (by default all,
    sorted).
    """
    if all(isinstance(label, (int, float)) for label in labels):
        if classes is not None:
            raise DataError("data: the labels are numbers here, but names in the training data")
        return np.asarray(labels, dtype=np.float64), None
    if not all(isinstance(label, str) for label in labels):
        kinds = sorted({type(label).__name__ for label in labels})
        raise DataError(f"data: labels must be all numbers or all names, got {', '.join(kinds)}")
    names = sorted(set(labels)) if classes is None else list(classes)
    unknown = set(labels) - set(names)
    if unknown:
        raise DataError(f"data: label {min(unknown)!r} is none of the classes {', '.join(names)}")
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[label] for label in labels], dtype=np.float64), names


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    labels: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[TokenShards, TokenShards | None]:
    """The training and the validation shard a config describes, prepared if need be; labels: for
    classification.

    Validation is None if neither data.validation nor data.validation_fraction asks for any.
    """

    def shard(spec: str | Sequence[str], split: Split, train: TokenShards | None) -> TokenShards:
        return prepare(
            spec,
            tokenizer,
            cache=config.cache,
            format=config.format,
            field=config.field,
            split=split,
            fraction=config.validation_fraction if split != "all" else 0.0,
            eos=config.add_eos,
            label_field=config.label_field if labels else None,
            classes=None if train is None else train.classes,
            separator=config.separator,
            validation_split=config.validation_split,
            progress=progress,
        )

    return both_sides(config, shard)


def both_sides(
    config: DataConfig, shard: Callable[[str | Sequence[str], Split, Shards | None], Shards]
) -> tuple[Shards, Shards | None]:
    """The training and the validation shard, made by ``shard`` from (files, split, the training shard if there is one).

    Validation is None if the config asks for none.
    """
    if config.train is None:
        raise DataError(
            "data.train: no text is named to train on; give a file, a folder, a glob or a list of them"
        )
    if config.validation is not None:
        train = shard(config.train, "all", None)
        return train, shard(config.validation, "all", train)
    if config.validation_fraction == 0 and config.validation_split == "documents":
        return shard(config.train, "all", None), None
    train = shard(config.train, "train", None)
    return train, shard(config.train, "validation", train)
