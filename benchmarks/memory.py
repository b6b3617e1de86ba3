"""Memory of nanochat's depth 20 in four arrangements of attention and Mamba: what trains one row, what generates.

python benchmarks/memory.py [--json FILE]

Nothing is timed and nothing allocated: activations are the peak of a step on tensors without numbers, with the
operations of this machine's CPU (a test holds such counts against measurement); caches are counted byte by byte.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from plait.cli.terminal import number, size, stdout, table
from plait.config.load import load_config
from plait.config.machine import cpu_name, git_commit, package_versions
from plait.models.model import Model
from plait.training.memory import step_memory

RESULTS = Path(__file__).parent / "results"
CONFIGS = ("transformer_d20", "hybrid_early_t_late_m_d20", "hybrid_alternating_d20", "mamba_d20")
VOCABULARY, LENGTH = 65536, 2048


def row(name: str) -> dict[str, Any]:
    """Parameters, and bytes: of the activations of one row of LENGTH tokens by precision, of one sequence's cache."""
    path = str(files("plait.compat.nanochat.configs") / f"{name}.py")
    found: dict[str, Any] = {"config": name}
    for precision in ("fp32", "bf16"):
        config = load_config(path, [f"--training.precision={precision}"])
        model = config.model.replace(vocab_size=VOCABULARY)
        step = step_memory(model, config.training, 1, LENGTH, accumulate=True, device=torch.device("cpu"))
        found[f"activations_{precision}"] = step.activations
    built = Model(model, device="meta")
    found["parameters"] = built.parameter_counts()["total"]
    for dtype in (torch.float32, torch.bfloat16):
        bytes_of = sum(block.mixer.state_bytes(1, LENGTH, dtype) for block in built.blocks)
        found[f"cache_{'fp32' if dtype == torch.float32 else 'bf16'}"] = bytes_of
    return found


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json", help="where the result goes")
    options = parser.parse_args()
    rows = [row(name) for name in CONFIGS]
    sizes = [name for name in rows[0] if name.startswith(("activations", "cache"))]
    shown = table("config", "parameters", *(name.replace("_", " ") for name in sizes))
    for found in rows:
        shown.add_row(found["config"], number(found["parameters"]), *(size(found[name]) for name in sizes))
    stdout().print(shown)
    result = {
        "rows": rows,
        "tokens": LENGTH,
        "vocabulary": VOCABULARY,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_commit(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
