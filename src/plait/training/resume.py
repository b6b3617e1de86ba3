"""Going on with a run: which checkpoint is meant, whether it is whole, and whether it is of this model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plait.config.errors import CheckpointError, dotted, nearest
from plait.config.explain import show
from plait.config.load import load_config
from plait.config.schema import Config, ModelConfig
from plait.config.text import plain
from plait.formats.folders import (
    CHECKPOINTS,
    RUN_CONFIG,
    checkpoint_step,
    is_checkpoint,
    list_checkpoints,
    newest_good,
)
from plait.formats.manifest import verify_manifest
from plait.formats.native import read_model_config

AUTO = "auto"


def find_checkpoint(resume: str | Path, run: Path) -> Path | None:
    """The verified checkpoint that ``resume`` means: a checkpoint, a run (its newest), or "auto".

    auto: the newest of ``run``, or None if it has none yet. CheckpointError, naming the file that is wrong
    and the newest good checkpoint before it, if it is not whole.
    """
    path = run if resume == AUTO else Path(resume)
    if not path.exists():
        if resume == AUTO:
            return None
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"--resume: there is no {path}{nearest(path.name, beside)}")
    if is_checkpoint(path):
        return verified(path)
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        if resume == AUTO:
            return None
        raise CheckpointError(
            f"--resume: {path} holds no checkpoint; give a run folder or a checkpoint in it"
        )
    return verified(checkpoints[-1])


def verified(folder: Path) -> Path:
    """The checkpoint itself, if every file of it is as it was written."""
    try:
        verify_manifest(folder)
    except CheckpointError as error:
        step = checkpoint_step(folder)
        earlier = [
            c for c in list_checkpoints(run_of(folder) or folder) if step is None or c.name < folder.name
        ]
        good = newest_good(earlier)
        offer = (
            "there is no earlier checkpoint to go on from"
            if good is None
            else f"the newest good one before it is {good}; go on from it with: plait train --resume {good}"
        )
        raise CheckpointError(f"{error}; {offer}") from None
    return folder


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in, or None if it was taken elsewhere."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def resumed_config(resume: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run or checkpoint with ``overrides`` on top; the run goes on where it lies."""
    path = Path(resume)
    folder = path
    if not is_checkpoint(path):
        checkpoints = list_checkpoints(path)
        folder = checkpoints[-1] if checkpoints else path
    file = folder / RUN_CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"--resume: {path} holds no {RUN_CONFIG}; give a run folder or one of its checkpoints"
        )
    config = load_config(file, overrides)
    run = run_of(folder)
    moved = run is not None and not any("training.out" in item.replace("-", "_") for item in overrides)
    return config.replace(training=config.training.replace(out=str(run))) if moved else config


def refuse_other_model(
    checkpoint: Path, model: ModelConfig, advice: str = "leave the model as it was, or begin a new run"
) -> None:
    """CheckpointError naming the first field in which a checkpoint's model is another than ``model``."""
    saved = read_model_config(checkpoint)
    found = difference(_described(saved), _described(model))
    if found is not None:
        path, there, here = found
        raise CheckpointError(
            f"{checkpoint} is of another model: {dotted(('model', *path))} is {show(there)} there and "
            f"{show(here)} here; {advice}"
        )


def differences(
    there: Any, here: Any, path: tuple[str | int, ...] = ()
) -> list[tuple[tuple[str | int, ...], Any, Any]]:
    """All places, (path, there, here), in which two plain values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        return [d for key in keys for d in differences(there.get(key), here.get(key), (*path, key))]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return [
            d for i, pair in enumerate(zip(there, here, strict=True)) for d in differences(*pair, (*path, i))
        ]
    return [] if there == here else [(path, there, here)]


def difference(there: Any, here: Any) -> tuple[tuple[str | int, ...], Any, Any] | None:
    """The first of ``differences``."""
    return next(iter(differences(there, here)), None)


def _described(model: ModelConfig) -> dict[str, Any]:
    """What the model is: its values, and its layers however they were written; not the preset's name."""
    values: dict[str, Any] = plain(model.model_dump(exclude={"preset", "pattern", "n_layer"}))
    kinds = {kind: values.pop(kind) for kind in model.sections}
    del kinds  # in the layers already
    layers = [
        {"kind": layer.kind, **layer.options.model_dump(), **layer.block.model_dump()}
        for layer in model.layers()
    ]
    return {**values, "layers": plain(layers)}
