"""Checkpoints: one folder for a step, complete or not there at all, the same for one process and for many.

    checkpoints/step-00001200/
      model.safetensors  config.json  tokenizer/     a model that plait.load reads
      config.yaml                                    the run's config
      trainer.json                                   step, place in the data, time, loss scale, best
      metadata.json                                  what the caller of train says of it, if anything
      train/optimizer/*.safetensors                  optimizer state by parameter name (torch DCP, reshards)
      train/rng-*.safetensors                        the random number generators of each process
      manifest.json                                  size and sha256 of all of these, written last

Written beside, under a hidden name, synced to the disk, then renamed. No pickles: DCP writes safetensors
here.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from plait.config.errors import CheckpointError
from plait.config.load import save_config
from plait.config.schema import Config
from plait.formats.folders import (
    CHECKPOINTS,
    RUN_CONFIG,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
)
from plait.formats.manifest import write_manifest
from plait.formats.native import reason, weights, write_model
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.training import rng
from plait.training.distributed import World, whole
from plait.training.optimizers import Optimizer

TRAINER, TRAIN, OPTIMIZER, METADATA = "trainer.json", "train", "train/optimizer", "metadata.json"


@dataclass
class RunState:
    """Where a run is: everything about it that is neither a tensor nor in the config."""

    step: int = 0  # updates of the weights
    sample: int = 0  # the next global sample index
    tokens: int = 0  # trained on so far, over all processes
    elapsed: float = 0.0  # seconds of training
    skipped: int = 0  # steps in a row, up to now, that were not finite
    scaler: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # the evaluation with the lowest loss, and its step


def save_checkpoint(
    run: Path,
    model: Model,
    config: Config,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    state: RunState,
    world: World,
    keep: int,
    scheduled: Collection[int] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of ``state.step``, remove all but the newest ``keep`` and those of ``scheduled`` steps.

    All processes call it.

    CheckpointError, with the earlier checkpoints untouched and nothing left of this one, if it cannot be
    written or the weights are not finite.
    """
    folder = run / CHECKPOINTS / checkpoint_name(state.step)
    temporary = folder.with_name(world.share(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp"))
    try:
        # Every process gathers, the first keeps: a sharded tensor's whole value needs them all.
        tensors = {name: _on_host(tensor, world) for name, tensor in weights(model).items()}
        with _together(world, folder):
            (temporary / OPTIMIZER).mkdir(parents=True, exist_ok=True)
            if world.first:
                _refuse_infinite(tensors)
                write_model(model, tensors, temporary, tokenizer)
                save_config(config, temporary / RUN_CONFIG)
                (temporary / TRAINER).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
                if metadata is not None:
                    (temporary / METADATA).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
            save_file(rng.capture(), temporary / TRAIN / _rng_name(world.rank))
        with _together(world, folder):
            _write_optimizer(optimizer, temporary / OPTIMIZER, world)
        with _together(world, folder):
            if world.first:
                write_manifest(temporary)
                _sync(temporary)
                _put(temporary, folder)
    finally:
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
    if world.first:
        for old in list_checkpoints(run)[:-keep]:
            if checkpoint_step(old) not in scheduled:
                shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return folder


def read_state(folder: Path) -> RunState:
    """The RunState of a checkpoint; CheckpointError if it is not one."""
    path = folder / TRAINER
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return RunState(**{f.name: data[f.name] for f in fields(RunState)})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from None


def load_optimizer(folder: Path, optimizer: Optimizer, world: World) -> None:
    """Put a checkpoint's optimizer state in place, whatever the number of processes that wrote it.

    CheckpointError, and nothing changed, if it is the state of another optimizer.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder / OPTIMIZER))
    state, saved = optimizer.state(), set(reader.read_metadata().state_dict_metadata)
    odd = sorted(saved ^ state.keys())
    if odd:
        raise CheckpointError(
            f"{folder} was written with another optimizer ({odd[0]} is only {'there' if odd[0] in saved else 'here'}); "
            "leave training.optimizer as it was"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP says that there is no process group, which is meant
        dcp.load(state, storage_reader=reader, no_dist=world.size == 1)


def load_rng(folder: Path, world: World, seed: int, step: int) -> None:
    """Set this process's generators to the checkpoint's; a process that was not there then begins anew."""
    path = folder / TRAIN / _rng_name(world.rank)
    if path.is_file():
        rng.restore(load_file(path))
    else:
        rng.seed_all(seed, world.rank, step)


@contextmanager
def _together(world: World, folder: Path) -> Iterator[None]:
    """What goes wrong inside on one process is an error on all of them, none waits for another."""
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as caught:
        error = caught
    except (OSError, SafetensorError, CheckpointException) as caught:
        error = CheckpointError(f"cannot save {folder}: {_cause(caught)}")
    world.agree(error)


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()))[0]
        return reason(inner) if isinstance(inner, Exception) else str(inner)
    return reason(error) if isinstance(error, Exception) else str(error)


def _on_host(tensor: Tensor, world: World) -> Tensor:
    full = whole(tensor)
    return full.cpu() if world.first else full[:0]


def _refuse_infinite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} has values that are not finite, so this state is not saved")


def _write_optimizer(optimizer: Optimizer, folder: Path, world: World) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(optimizer.state()), storage_writer=writer, no_dist=world.size == 1)


def _rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def _put(temporary: Path, folder: Path) -> None:
    """Rename, also over an earlier checkpoint of the same step."""
    replaced = temporary.with_name(temporary.name + ".old")
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync_folder(folder.parent)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("r+b") as handle:  # Windows syncs only what is open for writing
                os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows has no handle for a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
