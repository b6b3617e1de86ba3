"""Checkpoints in nanochat's layout, saved and loaded by nanochat's calls.

    d20/model_021400.pt   optim_021400.pt   meta_021400.json

since November 2025 optim_021400_rank0.pt, and one for each further process.
A meta without ``block_pattern`` is an all-transformer's. Where a folder holds a run of Plait's instead (what
scripts.base_train writes), loading takes its newest checkpoint.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from plait.compat.nanochat.common import get_base_dir
from plait.compat.nanochat.gpt import GPT
from plait.compat.nanochat.gpt_config import GPTConfig, gpt_config_of
from plait.compat.nanochat.tokenizer import RustBPETokenizer
from plait.config.errors import CheckpointError, nearest
from plait.config.load import load_config
from plait.formats import nanochat_files as names
from plait.formats.convert import convert
from plait.formats.folders import (
    CHECKPOINTS,
    RUN_CONFIG,
    checkpoint_name,
    checkpoint_step,
    find_model_folder,
    list_checkpoints,
)
from plait.formats.foreign import read_file, read_json, unwrapped
from plait.formats.nanochat import read
from plait.formats.native import load_model as load_plait
from plait.formats.native import reason, save_model
from plait.tokenizers.files import write_file

SOURCES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
PHASES = ("train", "eval")


def save_checkpoint(
    checkpoint_dir: str | Path,
    step: int,
    model_data: Mapping[str, Any],
    optimizer_data: Any,
    meta_data: Mapping[str, Any],
) -> None:
    """Write the files of a step: a state dict, the optimizers' states (None: no such file), and the meta as JSON."""
    folder = Path(checkpoint_dir)
    try:
        if optimizer_data is not None:
            write_file(names.optimizer_file(folder, step), _saved(optimizer_data))
        write_file(names.meta_file(folder, step), json.dumps(dict(meta_data), indent=2).encode())
        write_file(names.weights_file(folder, step), _saved(dict(model_data)))
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {reason(error)}") from error


def load_checkpoint(
    checkpoint_dir: str | Path,
    step: int,
    device: torch.device | str = "cpu",
    load_optimizer: bool = False,
    rank: int = 0,
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(state dict on ``device``, the optimizers' states or None, meta) of a step; CheckpointError without them.

    rank: whose file of states, where several processes wrote one each. ``GPT.setup_optimizers`` gives optimizers that
    take October's states in.
    """
    folder = Path(checkpoint_dir)
    tensors = {
        name: tensor.to(device) for name, tensor in read_file(names.weights_file(folder, step)).items()
    }
    optimizer = None
    if load_optimizer:
        ranked = names.optimizer_file(folder, step, rank)
        optimizer = read_file(ranked if ranked.is_file() else names.optimizer_file(folder, step))
    return tensors, optimizer, read_json(names.meta_file(folder, step))


def build_model(
    checkpoint_dir: str | Path, step: int, device: torch.device | str, phase: str
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """(model, tokenizer, meta) of a step; ``phase`` is train or eval."""
    tensors, _, meta = load_checkpoint(checkpoint_dir, step, device)
    if not isinstance(meta.get("model_config"), dict):
        raise CheckpointError(f"{names.meta_file(Path(checkpoint_dir), step)} has no model_config")
    try:
        config = GPTConfig(**meta["model_config"])
    except TypeError as error:
        raise CheckpointError(
            f"{names.meta_file(Path(checkpoint_dir), step)}: not a model of October 2025 or its hybrid ({error}); "
            "plait.formats.nanochat.read takes those of July 2026"
        ) from None
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.load_state_dict(unwrapped(tensors))
    tokenizer = RustBPETokenizer.from_directory(names.tokenizer_folder(Path(checkpoint_dir)))
    return _in_phase(model, phase), _fitting(tokenizer, model), meta


def find_largest_model(checkpoints_dir: str | Path) -> str:
    """The tag of the largest d<depth> in a folder; else the one changed last. CheckpointError if there is none."""
    folder = Path(checkpoints_dir)
    tags = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    depths = {int(tag[1:]): tag for tag in tags if tag[:1] == "d" and tag[1:].isdigit()}
    if depths:
        return depths[max(depths)]
    if not tags:
        raise CheckpointError(f"there is no model in {folder}")
    return max(tags, key=lambda tag: (folder / tag).stat().st_mtime)


def find_last_step(checkpoint_dir: str | Path) -> int:
    """The last step that is saved in a model's folder; CheckpointError if there is none."""
    steps = [
        step for path in Path(checkpoint_dir).glob("model_*.pt") if (step := names.step_of(path)) is not None
    ]
    if not steps:
        raise CheckpointError(f"{checkpoint_dir} holds no model_<step>.pt")
    return max(steps)


def load_model_from_dir(
    checkpoints_dir: str | Path,
    device: torch.device | str,
    phase: str,
    model_tag: str | None = None,
    step: int | None = None,
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """The model of a tag (the largest) at a step (the last)."""
    folder = Path(checkpoints_dir) / (find_largest_model(checkpoints_dir) if model_tag is None else model_tag)
    if (folder / CHECKPOINTS).is_dir():
        return _from_run(folder, device, phase, step)
    return build_model(folder, find_last_step(folder) if step is None else step, device, phase)


def load_model(
    source: str, device: torch.device | str = "cpu", phase: str = "eval", **which: Any
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """The model of a stage, base, mid, sft or rl, in nanochat's folder; ``which``: model_tag, step."""
    return load_model_from_dir(_stage(source), device, phase, **which)


@contextmanager
def plait_folder(
    source: str, model_tag: str | None = None, step: int | None = None, *, allow_pickle: bool = False
) -> Iterator[Path]:
    """The same model as a folder that ``plait`` loads: its checkpoint, or nanochat's files converted for a while."""
    folder = _stage(source)
    folder /= find_largest_model(folder) if model_tag is None else model_tag
    if (folder / CHECKPOINTS).is_dir():
        yield find_model_folder(_checkpoint(folder, step))
        return
    file = names.weights_file(folder, find_last_step(folder) if step is None else step)
    model, tokenizer = read(file, allow_pickle=allow_pickle)
    with TemporaryDirectory(prefix="plait-") as temporary:
        save_model(model, temporary, tokenizer)
        yield Path(temporary)


@contextmanager
def plait_checkpoint(run: Path, step: int) -> Iterator[Path]:
    """The checkpoint of a step in a model's folder: Plait's, or nanochat's files with the optimizers' state, converted
    for a while. CheckpointError if nanochat's model lies there without that state.
    """
    file = names.weights_file(run, step)
    own = run / CHECKPOINTS / checkpoint_name(step)
    if own.is_dir() or not file.is_file():
        yield own
        return
    if not names.optimizer_files(run, step):
        raise CheckpointError(
            f"{file} lies there without {names.optimizer_file(run, step, 0).name}, so training cannot go on from "
            "that step; convert the model and begin with its weights, by --training.init_from"
        )
    with TemporaryDirectory(prefix="plait-") as temporary:
        convert(file, Path(temporary) / run.name, "nanochat")
        yield list_checkpoints(Path(temporary) / run.name)[-1]


def _stage(source: str) -> Path:
    if source not in SOURCES:
        raise CheckpointError(f"{source!r} is none of {', '.join(SOURCES)}{nearest(source, SOURCES)}")
    return get_base_dir() / SOURCES[source]


def _checkpoint(run: Path, step: int | None) -> Path:
    return run if step is None else run / CHECKPOINTS / checkpoint_name(step)


def _from_run(
    run: Path, device: torch.device | str, phase: str, step: int | None
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    folder = find_model_folder(_checkpoint(run, step))
    config = load_config(folder / RUN_CONFIG)
    model = load_plait(folder, device)
    if model.tokenizer is None:
        raise CheckpointError(f"{folder} holds no tokenizer")
    face = GPT.over(model, gpt_config_of(model.config, config.data.sequence_length))
    meta = {"step": checkpoint_step(folder), "model_config": dict(face.config.__dict__)}
    return _in_phase(face, phase), RustBPETokenizer(model.tokenizer), meta


def _in_phase(model: GPT, phase: str) -> GPT:
    if phase not in PHASES:
        raise CheckpointError(f"phase {phase!r} is none of {', '.join(PHASES)}")
    return model.train(phase == "train")


def _fitting(tokenizer: RustBPETokenizer, model: GPT) -> RustBPETokenizer:
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.get_vocab_size()} ids, but the model {model.config.vocab_size}: they do not "
            "belong together"
        )
    return tokenizer


def _saved(data: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(data, stream)
    return stream.getvalue()
