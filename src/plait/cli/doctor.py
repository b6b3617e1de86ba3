"""``plait doctor``: what this machine offers, and whether every backend of every op computes right on it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from plait.cli.terminal import pairs, size, stderr, stdout, table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

app = typer.Typer(add_completion=False)

CORE = ("torch", "numpy", "numba", "safetensors", "tokenizers", "pydantic")
# package -> what it gives, how it comes
OPTIONAL = {
    "triton": ("GPU kernels, torch.compile on GPUs", "comes with torch for CUDA"),
    "pyarrow": ("Parquet files as data", "pip install 'plait[data]'"),
    "matplotlib": ("loss curves: plait plot", "pip install 'plait[plots]'"),
    "sentencepiece": ("SentencePiece tokenizers", "pip install 'plait[hf]'"),
}
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@app.command()
def doctor() -> None:
    """Show versions, devices, memory and packages, and check every backend's numbers against the reference.

    The exit status is 1 if a backend computes wrong.
    """
    console = stdout()
    with stderr().status("looking around"):
        facts = [*_versions(), *_machine()]
    console.print(pairs(facts))
    console.print()
    console.print(pairs(_packages()))
    with stderr().status("checking each backend"):
        found, notes, failures = check_backends()
    console.print(found)
    for note in notes:
        console.print(note, style="dim")
    if failures:
        for failure in failures:
            console.print(f"wrong: {failure}", style="bold red")
        console.print(
            "Other backends are not affected: choose one with PLAIT_BACKEND=portable, and please report this."
        )
        raise typer.Exit(1)
    console.print("Every backend that can run here computes what the reference does.")


def check_backends() -> tuple[Table, list[str], list[str]]:
    """The op x backend table with errors, remarks on what cannot run, and the names of what is wrong."""
    from plait.cli.selfcheck import TOLERANCE
    from plait.ops.dispatch import BACKENDS
    from plait.ops.dispatch import table as backends

    rows = backends()
    places = _places()
    accelerator = [("portable", place) for place in places if place.type != "cpu"]
    columns = [(name, _place_of(name, places)) for name in BACKENDS] + accelerator
    made = table(
        "op", *(name if place.type in ("cpu", name) else f"{name} on {place.type}" for name, place in columns)
    )
    available = {(row.op, row.backend): row for row in rows}
    failures: list[str] = []
    for op in dict.fromkeys(row.op for row in rows):
        cells = []
        for name, place in columns:
            if not available[op, name].available:
                cells.append("-")
                continue
            error, problem = _check(op, name, place)
            wrong = problem or (
                f"error {error:.1e}, at most {TOLERANCE:g} is allowed" if error > TOLERANCE else ""
            )
            if wrong:
                failures.append(f"{name} {op} on {place.type}: {wrong}")
            cells.append("WRONG" if wrong else f"{error:.1e}")
        made.add_row(op, *cells)
    # An op that has no such backend is a matter of course; a backend that lacks something is worth a line.
    lacking = {
        (row.backend, row.reason)
        for row in rows
        if not row.available and "this op has only" not in row.reason
    }
    notes = ["error in float32 against the reference in float64, outputs and gradients; - : not here"]
    notes += [f"{backend}: {reason}" for backend, reason in sorted(lacking)]
    return made, notes, failures


def _check(op: str, backend: str, place: torch.device) -> tuple[float, str]:
    """(error, "") of a backend, or (infinity, what it raised)."""
    from plait.cli import selfcheck

    try:
        return selfcheck.check(op, backend, place), ""
    except Exception as error:  # whatever a backend does wrong on this machine is what we are looking for
        return float("inf"), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _places() -> list[torch.device]:
    import torch

    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _place_of(backend: str, places: list[torch.device]) -> torch.device:
    cuda = [place for place in places if place.type == "cuda"]
    return cuda[0] if backend == "gpu" and cuda else places[0]


def _versions() -> list[tuple[str, Any]]:
    import plait

    packages = ", ".join(f"{name} {_version(name) or 'missing'}" for name in CORE)
    return [
        (
            "plait",
            f"{plait.__version__}, Python {platform.python_version()} on {platform.platform(terse=True)}",
        ),
        ("packages", packages),
    ]


def _machine() -> list[tuple[str, Any]]:
    import torch

    from plait.data.prepare import cache_folder

    rows: list[tuple[str, Any]] = [
        ("CPU", f"{_cpu()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads for torch")
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


def _packages() -> list[tuple[str, str]]:
    rows = []
    for name, (gives, how) in OPTIONAL.items():
        found = _version(name)
        rows.append((name, f"{found}: {gives}" if found else f"not installed: {gives} ({how})"))
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
