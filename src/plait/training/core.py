"""CORE while a run trains: the tasks of a local folder, asked of the model as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from plait.config.training import TrainingConfig
from plait.evaluation.core import CoreTask, TaskScore, core_score, read_bundle, right_answers, task_score
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.training.distributed import World, gathered
from plait.training.precision import autocast


def open_tasks(config: TrainingConfig, world: World) -> list[CoreTask]:
    """The tasks that a run is evaluated on, [] if none are named; DataError for a folder that is no bundle."""
    folder = config.core_tasks
    return [] if folder is None else world.first_makes(lambda: read_bundle(folder))


def ask_tasks(
    model: Model, tokenizer: Tokenizer, tasks: Sequence[CoreTask], config: TrainingConfig, world: World
) -> list[TaskScore]:
    """How each task goes, in the run's precision; the processes share the items, and each gets the result."""
    right, asked = [], []
    with gathered(model), autocast(config.precision, world.device), _uncompiled(config.compile):
        for task in tasks:
            counts = right_answers(
                model,
                task,
                tokenizer=tokenizer,
                limit=config.core_max_per_task,
                rank=world.rank,
                world=world.size,
            )
            right.append(counts[0])
            asked.append(counts[1])
    totals = [int(total) for total in world.sums([*right, *asked])]
    return [task_score(*each) for each in zip(tasks, totals[: len(tasks)], totals[len(tasks) :], strict=True)]


def core_record(scores: Sequence[TaskScore]) -> dict[str, Any]:
    """What metrics.jsonl holds of them."""
    tasks = {s.name: {"accuracy": s.accuracy, "centered": s.centered, "items": s.n_items} for s in scores}
    return {"kind": "core", "core": core_score(scores), "tasks": tasks}


def _uncompiled(compiled: bool) -> AbstractContextManager[Any]:
    """Questions have ever new lengths, for each of which a compiled block would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
