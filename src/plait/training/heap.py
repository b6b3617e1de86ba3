"""On a CPU: the memory that a step frees is kept for the next one.

glibc gives large blocks back to the system at once, and the next step gets new ones page by page, filled with zeros:
with 70M parameters and 256 tokens half a gigabyte a step, a quarter of its time in a virtual machine.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_GLIBC = platform.libc_ver()[0] == "glibc"
# mallopt's parameters, and glibc's defaults (mallopt(3))
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10, _MMAP_MAX: 65536}
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20, _MMAP_MAX: 0}


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Within, freed memory stays with this process, for tensors to come; afterwards what is free is given back.

    For GPUs, and other C libraries than glibc, nothing changes.
    """
    kept = device.type == "cpu" and _GLIBC
    if kept:
        _set(_KEEP)
    try:
        yield
    finally:
        if kept:
            _set(_DEFAULTS)
            give_back()


def give_back() -> None:
    """Return what is free of this process's memory to the system, where the C library can be asked."""
    if _GLIBC:
        ctypes.CDLL(None).malloc_trim(0)


def _set(values: dict[int, int]) -> None:
    for parameter, value in values.items():
        ctypes.CDLL(None).mallopt(parameter, value)
