"""Where a corpus lies: files, folders, globs and the standard library, as a sorted list of sources with
stable names.

A source's name is its path below the folder or the fixed part of the glob it was found by, in POSIX form.
Names, not places on a disk, decide what is held out, so the split is the same on every machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal, cast

from plait.config.errors import DataError, nearest
from plait.data.stdlib import stdlib_files

Format = Literal["text", "jsonl", "parquet", "bytes"]
Split = Literal["all", "train", "validation"]
FORMATS = ("auto", "text", "jsonl", "parquet", "bytes")
STDLIB = "stdlib:"
COMPRESSED = (".gz", ".bz2", ".xz")
_BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".bin": "bytes",
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".zst")


@dataclass(frozen=True)
class Source:
    """One file of a corpus."""

    path: Path
    name: str
    format: Format
    separator: int | None = None  # bytes: what ends a document; None: the file is one

    @property
    def whole(self) -> bool:
        """Whether the file is one document, and no container of many."""
        return self.format == "text" or (self.format == "bytes" and self.separator is None)

    def signature(self) -> tuple[str, str, int, int]:
        """Name, format (with its separator), size in bytes and time of change in ns.

        DataError if the file cannot be looked at.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error
        form = self.format if self.separator is None else f"{self.format} {self.separator}"
        return self.name, form, status.st_size, status.st_mtime_ns


def held_out(name: str, fraction: float) -> bool:
    """Whether the document or file of this name belongs to the held-out fraction: by its sha256, nothing
    else.
    """
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return number < fraction * 2.0**64


def by_last_file(sources: Sequence[Source], split: Split) -> list[Source]:
    """A side of a corpus whose last file is held out; DataError if that leaves nothing to train on."""
    if len(sources) < 2:
        raise DataError(
            "data.validation_split: last_file needs two files at least, one to train on and one to hold out; "
            f"there is {', '.join(source.name for source in sources) or 'none'}"
        )
    return {"all": list(sources), "train": [*sources[:-1]], "validation": [sources[-1]]}[split]


def resolve_sources(
    spec: str | Sequence[str], format: str = "auto", separator: int | None = None
) -> list[Source]:
    """The files a spec means: a file, a folder (searched to the bottom, hidden names left out), a glob,
    `stdlib:`, or a list of these. separator: the byte that ends a document in files of raw bytes. DataError
    if one of them matches nothing, if the format is unknown, or if no file has a separator.
    """
    if format not in FORMATS:
        raise DataError(f"data.format: {format!r} is none of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    entries = [spec] if isinstance(spec, str) else list(spec)
    if not entries:
        raise DataError("data: no file is named; give a file, a folder, a glob or a list of them")
    found: dict[Path, Source] = {}
    for entry in entries:
        for path, name in _matches(entry):
            kind = _format_of(path, format)
            found.setdefault(path.resolve(), Source(path, name, kind, separator if kind == "bytes" else None))
    if separator is not None and not any(source.format == "bytes" for source in found.values()):
        raise DataError(
            f"data.separator is {separator}, but none of the files holds raw bytes; leave it out, or set "
            "data.format: bytes"
        )
    return list(found.values())


def _matches(entry: str) -> list[tuple[Path, str]]:
    if entry == STDLIB:
        return [(path, name) for name, path in stdlib_files()]
    path = Path(entry).expanduser()
    if path.is_dir():
        below = [(file, file.relative_to(path).as_posix()) for file in _walk(path)]
        if not below:
            raise DataError(f"data: the folder {entry} holds no file")
        return sorted(below, key=lambda item: item[1])
    if path.exists():
        return [(path, path.name)]
    if not has_magic(entry):
        raise DataError(f"data: there is no file or folder {entry}")
    fixed = Path(*_fixed_parts(path))
    files = [Path(name) for name in glob(str(path), recursive=True) if os.path.isfile(name)]
    if not files:
        raise DataError(f"data: no file matches {entry}")
    return sorted(((file, file.relative_to(fixed).as_posix()) for file in files), key=lambda item: item[1])


def _fixed_parts(path: Path) -> Iterator[str]:
    for part in path.parts:
        if has_magic(part):
            return
        yield part


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"data: {error.filename} cannot be read: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(place) / name for name in files if not name.startswith("."))


def _format_of(path: Path, format: str) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    if last in _ARCHIVES:
        raise DataError(
            f"data: {path} is an archive; unpack it first (read as they are: {', '.join(COMPRESSED)})"
        )
    if format == "auto":
        return _BY_SUFFIX.get(last, "text")
    return cast("Format", format)
