"""Backends that `plait doctor` found to compute wrong on this machine: kept in a file, so that no op uses them.

A verdict belongs to what it was found on (processor, versions of Plait and of what its kernels are made with); a
change of any of these ends it, and so does the next `plait doctor` that finds the backend right.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from plait.config.machine import cache_folder, cpu_name, package_version

_MADE_WITH = {"gpu": ("triton",), "cpu": ("numba",)}
_log = logging.getLogger("plait.ops")
Found = Mapping[tuple[str, str, str], str]
"""What is wrong with (op, backend, type of device), in words."""


class _State:
    """Whether verdicts count now; the process's, as the backends it decides about."""

    counts = True


def verdicts_file() -> Path:
    """Where the verdicts about this user's machine are kept."""
    return cache_folder() / "wrong-backends.json"


def against(op: str, backend: str, device_type: str) -> str:
    """Why this backend must not be used for this op on such a device, or nothing."""
    wrong = _held().get((op, backend, device_type)) if _State.counts else None
    return (
        f"plait doctor found it wrong on this machine ({wrong}); run it again to lift that" if wrong else ""
    )


@contextmanager
def ignored() -> Iterator[None]:
    """Inside, every backend may be tried: for who is about to judge them anew."""
    before, _State.counts = _State.counts, False
    try:
        yield
    finally:
        _State.counts = before


def record(wrong: Found) -> None:
    """Replace the verdicts by these, found just now; none: nothing is left of earlier ones."""
    path = verdicts_file()
    _held.cache_clear()
    if not wrong:
        path.unlink(missing_ok=True)
        return
    rows = [
        {"op": op, "backend": backend, "device": device, "on": _machine(backend, device), "wrong": words}
        for (op, backend, device), words in wrong.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    temporary.replace(path)


@cache
def _held() -> Found:
    """The verdicts that hold here; read once a process."""
    try:
        rows = json.loads(verdicts_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        _log.warning("%s is damaged and not heeded: run plait doctor, which writes it anew", verdicts_file())
        return {}
    return {
        (row["op"], row["backend"], row["device"]): row["wrong"]
        for row in rows
        if row["on"] == _machine(row["backend"], row["device"])
    }


def _machine(backend: str, device_type: str) -> dict[str, str]:
    """What a backend's numbers on a device depend on."""
    on_gpu = device_type == "cuda" and torch.cuda.is_available()
    packages = ("plait", "torch", *_MADE_WITH.get(backend, ()))
    versions = {name: package_version(name) or "" for name in packages}
    return {"processor": torch.cuda.get_device_name() if on_gpu else cpu_name(), **versions}
