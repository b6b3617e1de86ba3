"""A run that began in another system: its state as a checkpoint of Plait's, from which training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.config.load import load_config, save_config
from plait.formats.folders import RUN_CONFIG, find_model_folder
from plait.formats.nanochat_run import ForeignRun
from plait.models.model import Model
from plait.training import rng
from plait.training.checkpoint import RunState, load_optimizer, save_checkpoint
from plait.training.distributed import World
from plait.training.optimizers import Optimizer
from plait.training.precision import LossScaler

_ALONE = World(0, 1, torch.device("cpu"))


def save_run(folder: Path, model: Model, begun: ForeignRun, out: Path | None = None) -> Path:
    """Write a run with one checkpoint, after ``begun.step`` steps; the checkpoint.

    The model must have its tokenizer. out: where the folder will lie, if not here. The caller's random state stays as
    it is. CheckpointError if the state is not that of the config's optimizer.
    """
    if model.tokenizer is None:
        raise CheckpointError(
            "the optimizers' state is there, but no tokenizer, without which no training goes on: give --tokenizer, "
            "or convert the model alone by --weights-only"
        )
    training = begun.config.training.replace(out=str(folder if out is None else out))
    config = begun.config.replace(training=training)
    optimizer = Optimizer(model, training)
    _fill(optimizer.state(), begun.optimizer)
    state = RunState(step=begun.step, sample=begun.sample, tokens=begun.tokens, elapsed=begun.elapsed)
    state.scaler = LossScaler(training.precision).state()
    with rng.preserved():
        rng.seed_all(training.seed, 0, state.step)
        written = save_checkpoint(folder, model, config, model.tokenizer, optimizer, state, _ALONE, keep=1)
    save_config(config, folder / RUN_CONFIG)
    return written


def _fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        raise CheckpointError(f"the optimizers' state has {'no' if odd[0] in own else 'an unknown'} {odd[0]}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"the optimizers' state {name} has the shape {tuple(tensors[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        tensor.copy_(tensors[name])


def optimizer_of(path: str | Path, model: Model) -> Optimizer:
    """The optimizer of a run's newest checkpoint, or of a checkpoint, with its state, for that checkpoint's model."""
    folder = find_model_folder(Path(path))
    optimizer = Optimizer(model, load_config(folder / RUN_CONFIG).training)
    load_optimizer(folder, optimizer, _ALONE)
    return optimizer
