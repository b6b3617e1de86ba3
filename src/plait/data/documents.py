"""Documents out of a corpus, one after another: whole text files, lines of JSONL, rows of Parquet, what stands
between the separators of raw bytes.

Nothing but the piece at hand is in memory. A document's name, and so the side it falls on when a fraction
is held out, is its file's name, with `#` and its number where a file holds many.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

from plait.config.errors import DataError, nearest
from plait.data.sources import Source, Split, by_last_file, held_out, resolve_sources

PIECE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name. `continues`: it is more of the one before (long files come in pieces); label: if
    asked for.
    """

    name: str
    text: str | bytes
    continues: bool = False
    label: Any = None


def read_documents(
    spec: str | Sequence[str],
    format: str = "auto",
    field: str = "text",
    *,
    split: Split = "all",
    fraction: float = 0.0,
    label_field: str | None = None,
    separator: int | None = None,
    validation_split: Literal["documents", "last_file"] = "documents",
) -> Iterator[Document]:
    """The documents of a corpus (see resolve_sources) in a fixed order; of a split, if one is named.

    Text files come as their bytes, so nothing of them is lost. If of a corpus of text files none, or all,
    would be held out, as of a single file, the last `fraction` of the largest is, from a line's beginning
    on. validation_split last_file: the last file is held out, whatever the fraction. DataError names the file,
    and the line or row, of what is wrong.
    """
    sources = resolve_sources(spec, format, separator)
    if validation_split == "last_file":
        sources, split = by_last_file(sources, split), "all"
    yield from documents_of(sources, field, split=split, fraction=fraction, label_field=label_field)


def documents_of(
    sources: Sequence[Source],
    field: str = "text",
    *,
    split: Split = "all",
    fraction: float = 0.0,
    label_field: str | None = None,
) -> Iterator[Document]:
    """As read_documents, of files already found."""
    cut = _file_to_cut(sources, fraction) if split != "all" else None
    for source in sources:
        if source.format in ("text", "bytes") and label_field is not None:
            raise DataError(f"{source.path}: a text file has no labels; give JSONL or Parquet")
        if source.whole:
            if source is cut:
                yield from _part_of_file(source, split, fraction)
            elif _wanted(source.name, split, fraction):
                yield from _text_document(source, 0, None)
        elif source.format == "bytes":
            for document in _separated(source):
                if _wanted(document.name, split, fraction):
                    yield document
        else:
            fields = [field] if label_field is None else [field, label_field]
            for place, values in _rows(source, fields):
                name = f"{source.name}#{place}"
                if not _wanted(name, split, fraction):
                    continue
                if not isinstance(values[0], str):
                    kind = type(values[0]).__name__
                    raise DataError(f"{source.path}:{place}: field {field!r} is not a text but {kind}")
                yield Document(name, values[0], label=values[1] if label_field is not None else None)


def _wanted(name: str, split: Split, fraction: float) -> bool:
    return split == "all" or held_out(name, fraction) == (split == "validation")


def _file_to_cut(sources: Sequence[Source], fraction: float) -> Source | None:
    """The largest text file, if whole files would leave one side without any."""
    if fraction <= 0 or not all(source.whole for source in sources):
        return None
    if len({held_out(source.name, fraction) for source in sources}) == 2:
        return None
    return max(sources, key=lambda source: (source.signature()[2], source.name), default=None)


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked by its suffix; whatever goes wrong while reading names the file."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        with openers.get(source.path.suffix.lower(), open)(source.path, "rb") as handle:
            yield handle
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{source.path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _text_document(source: Source, start: int, stop: int | None) -> Iterator[Document]:
    """Bytes start .. stop of a file as one document, in pieces that end where lines end, if they can."""
    with _opened(source) as handle:
        handle.seek(start)
        at, kept, continues = start, b"", False
        while chunk := handle.read(PIECE_BYTES if stop is None else min(PIECE_BYTES, stop - at)):
            at += len(chunk)
            kept += chunk
            cut = _last_boundary(kept)
            if len(kept) >= PIECE_BYTES and cut:
                yield Document(source.name, kept[:cut], continues)
                kept, continues = kept[cut:], True
        if kept:
            yield Document(source.name, kept, continues)


def _last_boundary(data: bytes) -> int:
    """Where to cut data: after its last line end, else before its last character, which may be incomplete."""
    line = data.rfind(b"\n") + 1
    if line:
        return line
    cut = len(data) - 1
    while cut > max(0, len(data) - 4) and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _part_of_file(source: Source, split: Split, fraction: float) -> Iterator[Document]:
    with _opened(source) as handle:
        size = handle.seek(0, os.SEEK_END)
        cut = int(size * (1 - fraction))
        handle.seek(cut)
        line_end = cut + len(handle.readline(PIECE_BYTES))
    cut = line_end if line_end < size else cut
    yield from _text_document(source, *((0, cut) if split == "train" else (cut, None)))


def _separated(source: Source) -> Iterator[Document]:
    """The documents of a file of raw bytes, each ended by the separator, long ones in pieces; not empty ones."""
    assert source.separator is not None
    end = bytes([source.separator])
    number, kept, continues = 1, b"", False
    with _opened(source) as handle:
        while chunk := handle.read(PIECE_BYTES):
            *ended, kept = (kept + chunk).split(end)
            for text in ended:
                if text:
                    yield Document(f"{source.name}#{number}", text, continues)
                number, continues = number + 1, False
            cut = _last_boundary(kept)
            if len(kept) >= PIECE_BYTES and cut:
                yield Document(f"{source.name}#{number}", kept[:cut], continues)
                kept, continues = kept[cut:], True
        if kept:
            yield Document(f"{source.name}#{number}", kept, continues)


def _rows(source: Source, fields: list[str]) -> Iterator[tuple[int, list[Any]]]:
    """(line or row number from 1 on, the fields' values) of each record of a JSONL or Parquet file."""
    return _jsonl_rows(source, fields) if source.format == "jsonl" else parquet_rows(source, fields)


def json_lines(source: Source) -> Iterator[tuple[int, Any]]:
    """(line number from 1 on, what it holds) of each line of a JSONL file that is not empty."""
    with _opened(source) as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source.path}:{number}: not a line of JSON: {error}") from error


def _jsonl_rows(source: Source, fields: list[str]) -> Iterator[tuple[int, list[Any]]]:
    for number, record in json_lines(source):
        if not isinstance(record, dict):
            raise DataError(f"{source.path}:{number}: a line must be an object, not {type(record).__name__}")
        for field in fields:
            if field not in record:
                raise DataError(
                    f"{source.path}:{number}: there is no field {field!r}{nearest(field, record)}; "
                    f"the line has {', '.join(map(repr, record)) or 'none'}"
                )
        yield number, [record[field] for field in fields]


def parquet_rows(source: Source, fields: list[str]) -> Iterator[tuple[int, list[Any]]]:
    """(row number from 1 on, the columns' values) of each row of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need the package pyarrow: pip install 'plait[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            for field in fields:
                if field not in names:
                    raise DataError(
                        f"{source.path}: there is no column {field!r}{nearest(field, names)}; "
                        f"it has {', '.join(map(repr, names))}"
                    )
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=fields):
                for values in zip(*(batch.column(field).to_pylist() for field in fields), strict=True):
                    number += 1
                    yield number, list(values)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{source.path} cannot be read: {str(error).splitlines()[0]}") from error
