"""Memory that a training step frees is there for the next one."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from plait.training import train, trainer
from plait.training.heap import kept_memory
from tests.training import runs

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="only glibc can be asked"
)
SIZE = 16 << 20  # floats: 64 MiB, which glibc maps anew each time
PAGES = SIZE * 4 // resource.getpagesize()


def faults() -> int:
    """Pages that this process touched for the first time in making and freeing a tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_freed_memory_is_used_again_and_given_back_at_the_end() -> None:
    with kept_memory(torch.device("cpu")):
        assert median(faults() for _ in range(7)) < PAGES // 1000
        held = resident()
    assert resident() < held - SIZE * 3  # most of the 64 MiB


def test_the_trainer_keeps_it_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = trainer.train_step

    def step(*arguments: Any) -> Any:
        seen.append(faults())
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", step)
    train(runs.tiny(tmp_path), quiet=True)
    assert len(seen) > 5 and median(seen) < PAGES // 1000
