"""This machine: the processor, versions of packages, the commit, where Plait keeps what it made. No torch here."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("plait", "torch", "numpy", "numba", "triton", "safetensors", "tokenizers")


def package_version(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Of Plait and of what decides its numbers; those that are installed."""
    return {name: found for name in _PACKAGES if (found := package_version(name)) is not None}


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the current folder, if it has one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cache_folder(given: str | Path | None = None) -> Path:
    """Where prepared data and findings about this machine are kept.

    As given, else $PLAIT_CACHE, else plait in the user's cache folder.
    """
    if given is not None:
        return Path(given).expanduser()
    if os.environ.get("PLAIT_CACHE"):
        return Path(os.environ["PLAIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plait"
