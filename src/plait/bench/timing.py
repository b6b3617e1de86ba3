"""Timing: the median of many calls on warm, quiet data, and a record of the machine beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from plait.config.errors import DataError
from plait.config.machine import cpu_name, git_commit, package_versions

_SECONDS = 1.0  # of repeats, a measurement
_MOST, _LEAST = 200, 5
_CACHE = 1 << 28  # bytes that are written between repeats on a GPU, so that no input waits in its cache


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, the fastest and the slowest of ``n``."""

    median: float
    least: float
    most: float
    n: int


@dataclass
class Result:
    """The rows of a benchmark, and on what they were measured."""

    name: str
    device: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: str | Path) -> None:
        """As JSON, with hardware, versions and commit; DataError if it cannot be written."""
        text = json.dumps({**asdict(self), **machine()}, indent=1) + "\n"
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git": git_commit(),
    }


def measure(call: Callable[[], object], device: torch.device, *, seconds: float = _SECONDS) -> Timing:
    """Time a call again and again for about so many seconds, after warming up."""
    return measure_together([call], device, seconds=seconds)[0]


def measure_together(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = _SECONDS,
    least: int = _LEAST,
) -> list[Timing]:
    """Time several calls in turns, so that what disturbs the machine disturbs them alike."""
    clock = _on_gpu if device.type == "cuda" else _on_host
    firsts = []
    for call in calls:
        call()
        firsts.append(clock(call))
    repeats = max(least, min(_MOST, int(1000 * seconds * len(calls) / max(sum(firsts), 1e-3))))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for times, call in zip(taken, calls, strict=True):
            times.append(clock(call))
    return [Timing(statistics.median(t), min(t), max(t), len(t)) for t in taken]


def steady(step: Callable[[], object], device: torch.device, *, seconds: float = _SECONDS) -> Timing:
    """Time steps that follow each other without a pause, as in a run: the host may be ahead of a GPU.

    The median is the mean of a third of the steps, so that what is still on its way when a step returns counts once.
    """
    for _ in range(2):
        step()
    first = _waiting(step, device, 1)
    count = max(2, min(_MOST, int(seconds / 3 / max(first / 1000, 1e-6))))
    thirds = [_waiting(step, device, count) for _ in range(3)]
    return Timing(statistics.median(thirds), min(thirds), max(thirds), 3 * count)


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _waiting(step: Callable[[], object], device: torch.device, count: int) -> float:
    """Milliseconds a step of ``count``, until the device has done them all."""
    wait(device)
    begin = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return 1000 * (time.perf_counter() - begin) / count


def _on_host(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def _on_gpu(call: Callable[[], object]) -> float:
    torch.empty(_CACHE, dtype=torch.int8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
