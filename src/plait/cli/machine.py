"""Facts about this machine for ``plait doctor``: versions, devices, memory, packages. Each is (name, what it is)."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from plait.cli.terminal import size
from plait.config.machine import cache_folder, cpu_name, package_version

Fact = tuple[str, str]
CORE = ("torch", "numpy", "numba", "safetensors", "tokenizers", "pydantic")
# package -> what it gives, how it comes
OPTIONAL = {
    "triton": ("GPU kernels, torch.compile on GPUs", "comes with torch for CUDA"),
    "pyarrow": ("Parquet files as data", "pip install 'plait[data]'"),
    "matplotlib": ("loss curves: plait plot", "pip install 'plait[plots]'"),
    "sentencepiece": ("SentencePiece tokenizers", "pip install 'plait[hf]'"),
}
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def versions() -> list[Fact]:
    """Of Plait, Python, and what Plait needs."""
    packages = ", ".join(f"{name} {package_version(name) or 'missing'}" for name in CORE)
    return [
        (
            "plait",
            f"{package_version('plait')}, Python {platform.python_version()} on {platform.platform(terse=True)}",
        ),
        ("packages", packages),
    ]


def hardware() -> list[Fact]:
    """Processors, memory, disk, compiler."""
    import torch

    rows: list[Fact] = [
        ("CPU", f"{cpu_name()}, {os.cpu_count()} logical cores; torch threads: {torch.get_num_threads()}")
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append(
            (f"GPU {index}", f"{gpu.name}, {size(gpu.total_memory)}, compute {gpu.major}.{gpu.minor}")
        )
    if torch.backends.mps.is_available():
        rows.append(("GPU", "Apple MPS, through the portable backend (untested)"))
    elif not torch.cuda.is_available():
        rows.append(("GPU", "none that torch sees"))
    rows.append(("memory", _memory()))
    rows.append(("large pages", _large_pages()))
    folder = cache_folder()
    rows.append(("data cache", f"{folder}, {size(shutil.disk_usage(_existing(folder)).free)} free"))
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    rows.append(
        ("C++ compiler", compiler or "none: needed by torch.compile on CPUs alone (--training.compile)")
    )
    chosen = os.environ.get("PLAIT_BACKEND")
    if chosen:
        rows.append(("PLAIT_BACKEND", f"{chosen}: every op is made to use it"))
    return rows


def optional_packages() -> list[Fact]:
    """What each that is there gives, and how one that is not comes."""
    rows = []
    for name, (gives, how) in OPTIONAL.items():
        found = package_version(name)
        rows.append((name, f"{found}: {gives}" if found else f"not installed: {gives} ({how})"))
    return rows


def _memory() -> str:
    """Of the machine; Linux tells what is free as well."""
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = (line.split() for line in info.read_text(encoding="utf-8").splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
        return f"{size(1024 * kib['MemTotal'])}, {size(1024 * kib['MemAvailable'])} available"
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return "unknown"


def _large_pages() -> str:
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    if not _PAGES.is_file():
        return "not on this system"
    mode = _PAGES.read_text(encoding="utf-8").partition("[")[2].partition("]")[0]
    return (
        f"the system says {mode}; torch {'asks' if asked else 'does not ask'} for them (THP_MEM_ALLOC_ENABLE)"
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
