"""The most memory that a call takes, as the device or the kernel of the system counts it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import torch

from plait.training.heap import give_back


def in_use(device: torch.device) -> int:
    """Bytes that tensors (on a GPU), or all of this process (on Linux), hold now; 0 where nobody counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    give_back()
    return _status("VmRSS:") if sys.platform == "linux" else 0


def peak_of(call: Callable[[], object], device: torch.device, before: int) -> int | None:
    """The most bytes in use during a call, less those that were in use ``before``; None where nobody counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the high-water mark begins anew
    call()
    return _status("VmHWM:") - before


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
