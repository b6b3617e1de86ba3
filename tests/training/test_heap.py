"""Memory that a training step frees is there for the next one."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path
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
        for _ in range(30):  # small things that lie in the gaps at first
            faults()
        assert sum(faults() for _ in range(20)) < 5 * PAGES
        held = resident()
    assert resident() < held - SIZE * 3  # most of the 64 MiB


def test_the_trainer_keeps_it_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = trainer.train_step

    def step(*arguments: Any) -> Any:
        seen.extend(faults() for _ in range(5))
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", step)
    train(runs.tiny(tmp_path), quiet=True)
    assert len(seen) > 5 and sum(seen) < 0.7 * len(seen) * PAGES
