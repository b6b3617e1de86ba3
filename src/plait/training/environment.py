"""env.json: on what a run was made, one entry each time it was started or resumed."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from plait.config.machine import cpu_name, git_commit, package_versions
from plait.tokenizers.files import write_file
from plait.training.distributed import World

ENVIRONMENT = "env.json"


def describe_environment(world: World) -> dict[str, Any]:
    """Versions, hardware, processes, command line; the git commit of the current folder, if it has one."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(world.device),
        "gpus": gpus,
        "processes": world.size,
        "git": git_commit(),
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
