"""Plait's own format: model.safetensors, config.json (the ModelConfig) and tokenizer/ in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.config.errors import CheckpointError, ConfigError
from plait.config.schema import ModelConfig
from plait.config.text import plain
from plait.formats.folders import MODEL_CONFIG, TOKENIZER, WEIGHTS, find_model_folder
from plait.formats.manifest import MANIFEST, verify_manifest
from plait.models.model import Model
from plait.nn.roles import cast_parameters
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.files import write_file
from plait.tokenizers.load import load_tokenizer

FORMAT = {"format": "pt"}  # one key: the order of several is not fixed, and equal models shall be equal files


def save_model(model: Model, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the model, and its tokenizer if given, into ``folder``, made if need be.

    A tied weight is saved once, bit for bit. CheckpointError if a file cannot be written.
    """
    try:
        write_model(model, weights(model), Path(folder), tokenizer)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save the model to {folder}: {reason(error)}") from error


def write_model(
    model: Model, tensors: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer | None
) -> None:
    """As ``save_model``, of given tensors; OSError or SafetensorError if a file cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.tmp"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=FORMAT)
        partial.replace(folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    text = json.dumps(plain(model.config.model_dump()), indent=1)
    write_file(folder / MODEL_CONFIG, text.encode())
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer under its name; a tied one once, under its first name."""
    return {name: tensor.detach() for name, tensor in _holders(model).items()}


def _holders(model: nn.Module) -> dict[str, Tensor]:
    """As ``weights``, but the model's own objects."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Model:
    """The model in a folder, in evaluation mode, with its tokenizer; ``path`` may be a run or a checkpoint.

    dtype: cast the parameters, except those whose role keeps them in float32; None: as they were saved.
    CheckpointError if a file is missing or damaged, or the tensors are not this model's.
    """
    folder = find_model_folder(Path(path))
    if (folder / MANIFEST).is_file():
        verify_manifest(folder, only=(WEIGHTS, MODEL_CONFIG))
    model = unfilled_model(read_model_config(folder))
    load_weights(model, folder)
    model.tokenizer = load_saved_tokenizer(folder)
    if dtype is not None:
        cast_parameters(model, dtype)
    return model.to(device).eval()


def unfilled_model(config: ModelConfig) -> Model:
    """A model on the host, its parameters allocated but not written: for weights that are about to come."""
    model = Model(config, device="meta")
    if next(model.buffers(), None) is not None:
        return Model(config, device="cpu")  # what is computed at initialisation is in no file
    # Not to_empty: it would give a tied weight two tensors.
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
            setattr(module, name, made[parameter])
    return model


def load_saved_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer saved beside a model (or in a run), or None if there is none."""
    folder = find_model_folder(Path(path)) / TOKENIZER
    return load_tokenizer(folder) if folder.is_dir() else None


def read_model_config(folder: Path) -> ModelConfig:
    """The ModelConfig saved in a folder; CheckpointError if there is none or it is not one."""
    path = folder / MODEL_CONFIG
    try:
        return ModelConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def load_weights(model: Model, folder: Path) -> None:
    """Put the tensors of ``folder/model.safetensors`` into a model, in the dtype they were saved in.

    CheckpointError, and nothing changed, if one is missing, unknown or of another shape.
    """
    path = folder / WEIGHTS
    wanted = _holders(model)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check(path, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, found)
            with torch.no_grad():
                for name, tensor in wanted.items():
                    _fill(tensor, file.get_tensor(name), f"{path}: {name}")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def fill_weights(model: Model, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors under our names into a model, in their own dtype; ``source`` says in errors whence they come.

    CheckpointError, and nothing changed, if one is missing, unknown or of another shape.
    """
    wanted = _holders(model)
    shapes = [{name: tuple(tensor.shape) for name, tensor in some.items()} for some in (wanted, tensors)]
    _check(source, *shapes)
    with torch.no_grad():
        for name, tensor in wanted.items():
            _fill(tensor, tensors[name], f"{source}: {name}")


def _fill(tensor: Tensor, saved: Tensor, name: str) -> None:
    if saved.dtype == tensor.dtype:
        tensor.copy_(saved)
    elif saved.is_floating_point() and tensor.is_floating_point():
        # A copy: what the file gives is mapped memory, whose alignment may change the last bit of a product.
        tensor.data = saved.to(tensor.device, copy=True)
    else:
        raise CheckpointError(f"{name} is {saved.dtype}, this model's {tensor.dtype}: it is of another model")


def _check(
    path: Path | str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise CheckpointError(
                f"{path} is of another model: {name} has shape {found[name]}, this model's {shape}"
            )
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    for names, what in ((missing, "has no"), (unknown, "has an unknown")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path} is of another model: it {what} tensor {names[0]}{more}")


def reason(error: Exception) -> str:
    """What went wrong with a file, in words, of an OSError or a SafetensorError."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
