"""A run's folder before the run begins: room is made, nobody else's run is written over."""

from __future__ import annotations

import shutil
from pathlib import Path

from plait.config.errors import TrainingError
from plait.formats.folders import CHECKPOINTS, checkpoint_name, checkpoint_step, list_checkpoints
from plait.training.resume import run_of
from plait.training.samples import SAMPLES

ABANDONED = "abandoned-"


def refuse_another_run(run: Path, checkpoint: Path | None) -> None:
    """TrainingError if ``run`` holds checkpoints of a run that this one does not go on with."""
    if list_checkpoints(run) and not _goes_on(run, checkpoint):
        raise TrainingError(
            f"{run} already holds a run: go on with it (plait train --resume {run}), or choose another "
            "folder with --training.out or --experiment_name"
        )


def make_room(run: Path, checkpoint: Path | None) -> list[str]:
    """Remove what was left unfinished, what a new run replaces, and set aside what comes after ``checkpoint``.

    Called when nothing can be refused any more. Returns lines to show; OSError if the disk does not let it.
    """
    run.mkdir(parents=True, exist_ok=True)
    remove_unfinished(run)
    if not _goes_on(run, checkpoint):
        for old in list_checkpoints(run):
            shutil.rmtree(old)
        shutil.rmtree(run / SAMPLES, ignore_errors=True)
        return []
    assert checkpoint is not None
    moved = set_aside_later(run, checkpoint_step(checkpoint) or 0)
    return [f"a later checkpoint was set aside: {folder}" for folder in moved]


def _goes_on(run: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and run_of(checkpoint.resolve()) == run.resolve()


def remove_unfinished(run: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing."""
    folder = run / CHECKPOINTS
    for path in folder.glob(".step-*.tmp*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``: a run that goes on from there will write its own."""
    moved = []
    for folder in list_checkpoints(run):
        if folder.name > checkpoint_name(step):
            target = folder.with_name(ABANDONED + folder.name)
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
            moved.append(target)
    return moved
