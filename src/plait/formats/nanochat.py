"""nanochat's checkpoints, of October 2025, of its hybrid and of July 2026: read, and written for nanochat to load.

What makes its numbers its own is named by options of the converted model: rotation by minus theta with tables in
bfloat16, norms without weights, soft-cap; in 2026 windows, value embeddings, smear and backout as well.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.config.errors import CheckpointError, ConfigError
from plait.config.schema import ModelConfig
from plait.formats import nanochat_files as files
from plait.formats.foreign import Tensors, make_model, read_file, read_json
from plait.formats.nanochat_groups import is_july
from plait.formats.nanochat_layout import SYSTEM, gpt_config, model_config, to_ours, to_theirs
from plait.formats.nanochat_optimizer_write import Optimizing, written
from plait.formats.native import reason, weights
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.files import write_file
from plait.tokenizers.nanochat import read_tokenizer, write_tokenizer


def from_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """The model of a state dict and its GPTConfig (or the meta that holds it), in evaluation mode and in float32.

    Weights are copied, embeddings that were stored in bfloat16 widened. CheckpointError names what does not fit.
    """
    section = model_config(config)
    try:
        wanted = ModelConfig.model_validate(section)
    except ConfigError as error:
        raise CheckpointError(f"{SYSTEM}: {error}") from None
    return make_model(section, to_ours(Tensors(tensors, SYSTEM), wanted), SYSTEM)


def read(
    path: str | Path | None = None, config: Mapping[str, Any] | None = None, *, allow_pickle: bool = False
) -> tuple[Model, Tokenizer | None]:
    """The model at ``path`` and the tokenizer beside it, if there is one.

    path: a file of weights, a model's folder (its last step), a folder of those (the largest d<depth>); None:
    NANOCHAT_BASE_DIR. config: the GPTConfig, if it does not lie beside the weights. allow_pickle: whether a
    tokenizer.pkl may be opened, for the tokenizer alone.
    """
    file = files.find_weights(files.base_folder() if path is None else Path(path))
    tensors = read_file(file)
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{file} holds no state dict but a {type(tensors).__name__}")
    model = from_state_dict(tensors, read_meta(file) if config is None else config)
    folder = files.tokenizer_folder(file.parent)
    if not folder.is_dir():
        return model, None
    tokenizer = read_tokenizer(folder, allow_pickle=allow_pickle)
    _check_vocabulary(model, tokenizer)
    return model, tokenizer


def read_meta(path: str | Path | None = None) -> dict[str, Any]:
    """The meta of the checkpoint that a path means: step, model_config and what the training noted."""
    file = files.find_weights(files.base_folder() if path is None else Path(path))
    step = files.step_of(file)
    if step is None:
        raise CheckpointError(
            f"{file} has not the name of a checkpoint, so no meta file belongs to it; give the configuration"
        )
    meta = read_json(files.meta_file(file.parent, step))
    if not isinstance(meta.get("model_config"), dict):
        raise CheckpointError(f"{files.meta_file(file.parent, step)} has no model_config")
    return meta


def write(
    model: Model,
    folder: str | Path,
    *,
    step: int,
    tokenizer: Tokenizer | None = None,
    sequence_len: int = 2048,
    meta: Mapping[str, Any] | None = None,
    optimizer: Optimizing | None = None,
    processes: int = 1,
) -> None:
    """Write model_<step>.pt and meta_<step>.json into a model's folder (<base>/base_checkpoints/d<depth>).

    A model of attention alone has exactly the keys of stock nanochat, of October 2025 or, if it is one of July 2026,
    of that; a hybrid has those of the fork. Weights are written in float32. The tokenizer goes where nanochat looks
    for it. sequence_len: nanochat's length of training, a tenth of the positions it can rotate. meta: what the meta
    says besides step and model_config. optimizer: the model's, whose state goes into optim_<step>*.pt, for attention
    alone; in July's form for a run on ``processes`` of nanochat's. CheckpointError, and nothing written, for what
    nanochat cannot express.
    """
    folder = Path(folder)
    gpt = gpt_config(model.config, sequence_len)
    tensors = weights(model)
    wide = [name for name, tensor in tensors.items() if tensor.dtype == torch.float64]
    if wide:
        raise CheckpointError(
            f"{SYSTEM} has no float64, and {wide[0]} is: convert the model first, by float()"
        )
    if tokenizer is not None:
        _check_vocabulary(model, tokenizer)
    theirs = ModelConfig.model_validate(model_config(gpt))
    data = _saved(to_theirs(tensors, theirs))
    states = [] if optimizer is None else [_saved(state) for state in written(optimizer, theirs, processes)]
    text = json.dumps({**(meta or {}), "step": step, "model_config": gpt}, indent=2)
    try:
        if tokenizer is not None:
            write_tokenizer(tokenizer, files.tokenizer_folder(folder))
        for rank, state in enumerate(states):
            write_file(files.optimizer_file(folder, step, rank if is_july(theirs) else None), state)
        write_file(files.meta_file(folder, step), text.encode())
        write_file(files.weights_file(folder, step), data)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {reason(error)}") from error


def _saved(data: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(data, stream)
    return stream.getvalue()


def _check_vocabulary(model: Model, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"{SYSTEM}: the tokenizer has {tokenizer.vocab_size} ids, but the model {model.vocab_size}: they do not "
            "belong together"
        )
