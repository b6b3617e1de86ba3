"""Memory that a training step frees is there for the next one.

In processes of their own, as training is: in one that has run for long, others may have taken the room behind the heap.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training import runs

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="only glibc can be asked"
)
SIZE = 16 << 20  # floats: 64 MiB, which glibc maps anew each time
PAGES = SIZE * 4 // resource.getpagesize()

HEAD = f"""
import json, resource, sys
from pathlib import Path
import torch
from plait.training import train, trainer
from plait.training.heap import kept_memory

def faults():
    "Pages that this process touched for the first time in making and freeing a tensor."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({SIZE})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
"""


def told(code: str, *arguments: str) -> Any:
    """What the code prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=runs.ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_freed_memory_is_used_again_and_given_back_at_the_end() -> None:
    again, held, left = told("""
with kept_memory(torch.device("cpu")):
    for _ in range(30):  # small things that lie in the gaps at first
        faults()
    again = sum(faults() for _ in range(20))
    held = resident()
print(json.dumps([again, held, resident()]))
""")
    assert again < 5 * PAGES
    assert left < held - SIZE * 3  # most of the 64 MiB


def test_the_trainer_keeps_it_while_it_runs(tmp_path: Path) -> None:
    runs.tiny(tmp_path)
    seen = told(
        """
from tests.training import runs
seen, real = [], trainer.train_step
def step(*arguments):
    seen.extend(faults() for _ in range(5))
    return real(*arguments)
trainer.train_step = step
train(runs.tiny(Path(sys.argv[1])), quiet=True)
print(json.dumps(seen))
""",
        str(tmp_path),
    )
    assert len(seen) > 5 and sum(seen) < 0.7 * len(seen) * PAGES
