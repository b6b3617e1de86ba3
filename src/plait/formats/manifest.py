"""The manifest of a folder: size and sha256 of every file; a truncated or changed one is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from plait.config.errors import CheckpointError
from plait.tokenizers.files import write_file

MANIFEST = "manifest.json"
VERSION = 1


def write_manifest(folder: Path) -> None:
    """List every file below ``folder`` in its manifest.json; OSError if it cannot be written."""
    files = {name: _describe(folder / name) for name in _files(folder)}
    text = json.dumps({"version": VERSION, "files": files}, indent=1)
    write_file(folder / MANIFEST, text.encode())


def verify_manifest(folder: Path, only: Collection[str] | None = None) -> None:
    """Raise CheckpointError naming the first file that is missing, truncated, changed or not listed.

    ``only``: check no other files, because no other is going to be read.
    """
    listed = _read(folder)
    for name, expected in listed.items():
        if only is not None and name not in only:
            continue
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path} is missing")
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes instead of {expected['bytes']}: it is truncated or changed"
            )
        if _describe(path) != expected:
            raise CheckpointError(f"{path} was changed: its sha256 is not the one in {MANIFEST}")
    if only is None:
        for name in _files(folder):
            if name not in listed:
                raise CheckpointError(f"{folder / name} does not belong here: {MANIFEST} does not list it")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise CheckpointError(f"{path}: version {manifest['version']!r}; this Plait reads {VERSION}")
        return {
            str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])}
            for name, f in manifest["files"].items()
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; the folder is incomplete") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from None


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
