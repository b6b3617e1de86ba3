"""What a path holds: a run (its checkpoints below), one checkpoint, or an exported model.

runs/name/checkpoints/step-00001200/    a checkpoint: the files of a model, the state of training, a manifest
anywhere/                               a model: model.safetensors, config.json, usually tokenizer/
"""

from __future__ import annotations

import re
from pathlib import Path

from plait.config.errors import CheckpointError, nearest
from plait.formats.manifest import MANIFEST, verify_manifest

WEIGHTS, MODEL_CONFIG, RUN_CONFIG, TOKENIZER = "model.safetensors", "config.json", "config.yaml", "tokenizer"
CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-(\d+)")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int | None:
    """The step that a checkpoint's name tells, or None if it is no checkpoint's name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; unfinished ones have another name and are not among them."""
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    steps = {path: step for path in found if (step := checkpoint_step(path)) is not None}
    return sorted(steps, key=lambda path: steps[path])


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, whole or not."""
    return (folder / MANIFEST).is_file() or (checkpoint_step(folder) is not None and folder.is_dir())


def newest_good(checkpoints: list[Path]) -> Path | None:
    """The newest checkpoint whose every file is as it was written."""
    for folder in reversed(checkpoints):
        try:
            verify_manifest(folder)
        except CheckpointError:
            continue
        return folder
    return None


def find_model_folder(path: Path) -> Path:
    """The folder of weights that a path means: itself, or the newest checkpoint of a run.

    CheckpointError if there is none.
    """
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"there is no folder {path}{nearest(path.name, beside)}")
    if path.is_dir():
        if (path / WEIGHTS).is_file() or is_checkpoint(path):
            return path
        checkpoints = list_checkpoints(path)
        if checkpoints:
            return checkpoints[-1]
        if (path / CHECKPOINTS).is_dir() or (path / RUN_CONFIG).is_file():
            raise CheckpointError(f"the run {path} has no checkpoint yet")
    raise CheckpointError(
        f"{path} holds no model: give a run, a checkpoint, or a folder with {WEIGHTS} and {MODEL_CONFIG}"
    )
