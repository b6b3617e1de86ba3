"""From an original's files to Plait's own folder, which ``plait.load`` and ``plait generate`` read."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from plait.config.errors import CheckpointError, nearest
from plait.config.lazy import load_object
from plait.formats.native import reason, save_model
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.files import new_folder

# Each module has read(path, config) -> (Model, Tokenizer | None) and from_state_dict(tensors, config) -> Model.
FORMATS: dict[str, str] = {
    "nanochat": "plait.formats.nanochat",
    "minimamba": "plait.formats.minimamba",
    "foundry": "plait.formats.foundry",
    "bitbyte": "plait.formats.bitbyte",
}
# Those whose files may hold a run to go on with: read_run(path, config) -> ForeignRun | None.
RUNS: dict[str, str] = {"nanochat": "plait.formats.nanochat_run:read_run"}


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    format: str,
    config: Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    allow_pickle: bool = False,
    weights_only: bool = False,
) -> Model:
    """Read ``source``, of the format of that name, and write it as a new folder of Plait's; the model, as written.

    source: the original's own folder or file, or a bare state dict, whose configuration is ``config``. tokenizer:
    saved with the model instead of the original's own. allow_pickle: whether nanochat's tokenizer.pkl may be opened,
    of which nothing but a tokenizer is read. Where the state of nanochat's optimizers lies beside the weights, the
    folder is a run to go on with, unless ``weights_only``. CheckpointError, and no folder, if anything does not fit.
    """
    folder = Path(destination)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already: name a new folder")
    model, own = read_original(source, format, config, allow_pickle=allow_pickle)
    model.tokenizer = _fitting(own if tokenizer is None else tokenizer, model)
    run = None if weights_only else _read_run(Path(source), format, config)
    try:
        with new_folder(folder) as temporary:
            if run is None:
                save_model(model, temporary, model.tokenizer)
            else:
                load_object("plait.training.adopt:save_run")(temporary, model, run, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {reason(error)}") from error
    return model


def read_original(
    source: str | PathLike[str],
    format: str,
    config: Mapping[str, Any] | None = None,
    *,
    allow_pickle: bool = False,
) -> tuple[Model, Tokenizer | None]:
    """The model, in evaluation mode, and the tokenizer that an original's folder or file holds."""
    if format not in FORMATS:
        raise CheckpointError(
            f"{format!r} is no format; there are {', '.join(FORMATS)}{nearest(format, FORMATS)}"
        )
    if allow_pickle and format != "nanochat":
        raise CheckpointError(
            f"--allow-pickle is for nanochat's tokenizer.pkl; {format} has none: leave it out"
        )
    path = Path(source)
    if not path.exists():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"there is no {path}{nearest(path.name, beside)}")
    found: tuple[Model, Tokenizer | None] = load_object(f"{FORMATS[format]}:read")(
        path, config, **({"allow_pickle": True} if allow_pickle else {})
    )
    return found


def _read_run(path: Path, format: str, config: Mapping[str, Any] | None) -> Any:
    """The run that the files hold beside the model, or None."""
    if format not in RUNS:
        return None
    try:
        return load_object(RUNS[format])(path, config)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --weights-only converts the model without it") from None


def _fitting(tokenizer: Tokenizer | None, model: Model) -> Tokenizer | None:
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.vocab_size}: it is of another model"
        )
    return tokenizer
