"""The CORE score of a base model, from the files of eval_bundle in nanochat's base folder (nothing is downloaded).

python -m plait.compat.nanochat.scripts.base_eval --model_tag=d20 --max_per_task=500
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from plait.compat.nanochat.checkpoint_manager import load_model
from plait.compat.nanochat.common import get_base_dir, run_script
from plait.compat.nanochat.configurator import read_command_line
from plait.config.section import Section
from plait.config.words import counted
from plait.evaluation.core import core_score, evaluate_task, read_bundle
from plait.training.distributed import choose_device


class BaseEval(Section):
    """The settings, under nanochat's names."""

    model_tag: str | None = Field(None, description="which model; None: the largest")
    model_step: int | None = Field(None, description="its step; None: the last")
    device_type: str = Field("", description="cuda, cpu or mps; empty: the best there is")
    max_per_task: int = Field(-1, description="items of a task at most; -1: all")


def main(words: Sequence[str]) -> int:
    """Print each task's accuracy and the CORE score, and keep them as base_eval/NAME.csv; the exit status."""
    given = BaseEval.model_validate(read_command_line(words, BaseEval).settings)
    device = choose_device(given.device_type or "auto")
    tasks = read_bundle(get_base_dir() / "eval_bundle")
    model, tokenizer, meta = load_model(
        "base", device, "eval", model_tag=given.model_tag, step=given.model_step
    )
    scores = []
    for task in tasks:
        limit = None if given.max_per_task < 0 else given.max_per_task
        score = evaluate_task(model.model, task, tokenizer=tokenizer.tokenizer, limit=limit)
        scores.append(score)
        print(
            f"{score.name}: accuracy {score.accuracy:.4f}, centered {score.centered:.4f} "
            f"({counted(score.n_items, 'item')})"
        )
    print(f"CORE metric: {core_score(scores):.4f}")
    path = get_base_dir() / "base_eval" / f"base_model_{int(meta.get('step', 0)):06d}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("Task", "Accuracy", "Centered"))
        rows.writerows((s.name, f"{s.accuracy:.6f}", f"{s.centered:.6f}") for s in scores)
        rows.writerow(("CORE", "", f"{core_score(scores):.6f}"))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
