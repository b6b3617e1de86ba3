"""env.json: on what a run was made, one entry each time it was started or resumed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from plait.tokenizers.files import write_file
from plait.training.distributed import World

ENVIRONMENT = "env.json"
_PACKAGES = ("plait", "torch", "numpy", "numba", "triton", "safetensors", "tokenizers")


def describe_environment(world: World) -> dict[str, Any]:
    """Versions, hardware, processes, command line; the git commit of the current folder, if it has one."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(world.device),
        "gpus": gpus,
        "processes": world.size,
        "git": _git_commit(),
    }


def write_environment(run: Path, world: World, step: int) -> None:
    """Append this start, at ``step``, to the run's env.json; OSError if it cannot be written."""
    path = run / ENVIRONMENT
    starts: list[Any] = []
    if step and path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            starts = earlier["starts"]
        except (ValueError, KeyError, TypeError):
            starts = []  # a record for people; a broken one is begun anew
    starts.append({"step": step, **describe_environment(world)})
    write_file(path, json.dumps({"starts": starts}, indent=1).encode())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
