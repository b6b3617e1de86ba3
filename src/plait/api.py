"""The public functions that put the floors together: ``plait.build``, ``plait.load``, ``plait.train``.

Nothing here needs a file, a global or a working folder: a model is built from values alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.config.errors import ConfigError, nearest
from plait.config.load import load_config
from plait.config.originals import translate
from plait.config.recipes import preset_names, recipe_names
from plait.config.schema import Config, ModelConfig

if TYPE_CHECKING:
    import torch

    from plait.models.model import Model
    from plait.tokenizers.base import Tokenizer
    from plait.training import TrainResult

Description = Config | ModelConfig | Mapping[str, Any] | str | os.PathLike[str]


def build(
    config: Description,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Model:
    """A new model with random weights, in training mode: ``plait.build("hybrid", d_model=128)``.

    ``config`` is a model's or a run's config, a mapping with the keys of one of them, the name of a preset or a recipe,
    or a file; ``overrides`` replace keys of the model. Without ``vocab_size`` the model gets the vocabulary of the
    config's tokenizer (bytes, unless it says otherwise), and the tokenizer as ``model.tokenizer``, for text in and out.
    On the device "meta" nothing is allocated. ConfigError, BuildError or TokenizerError say what is wrong.
    """
    from plait.models.model import Model

    run = describe(config, overrides)
    vocab_size, tokenizer = vocabulary(run)
    model = Model(run.model.replace(vocab_size=vocab_size), device=device, dtype=dtype)
    model.tokenizer = tokenizer
    return model


def load(
    path: str | os.PathLike[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Model:
    """A trained model in evaluation mode, with its ``tokenizer``: ``plait.load("runs/tiny").generate("Once")``.

    ``path`` is a run (its newest checkpoint is taken), a checkpoint, or a folder with a saved model. ``device`` may be
    "auto"; None is the CPU. ``dtype`` casts all but what must stay float32. CheckpointError if there is no such model.
    """
    from plait.formats.native import load_model
    from plait.training.distributed import choose_device

    return load_model(Path(path), choose_device("cpu" if device is None else str(device)), dtype)


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Train the run that ``config`` describes: a config, a mapping, a recipe's name or a file.

    ``resume``: "auto" for the run's own newest checkpoint, or a run or a checkpoint by its folder (then ``config`` may
    be left out); None starts anew, in a folder that holds no run unless ``overwrite``. ``quiet``: show nothing.
    A PlaitError says what is wrong.
    """
    from plait.training import train as run

    return run(config, resume=None if resume is None else os.fspath(resume), overwrite=overwrite, quiet=quiet)


def describe(config: Description, overrides: Mapping[str, Any] | None = None) -> Config:
    """The run that any description of a model or a run means, with keys of the model replaced.

    A model alone becomes a run with the defaults of everything else.
    """
    changes = dict(overrides or {})
    if isinstance(config, str | os.PathLike):
        refuse_unknown_name(config)
        return load_config(
            config, [f"--model.{key}={_as_text(key, value)}" for key, value in changes.items()]
        )
    if isinstance(config, ModelConfig):
        config = Config(model=config)
    if isinstance(config, Config):
        return config.replace(model=config.model.replace(**changes)) if changes else config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"a model is described by a config, a mapping, a name or a file; got a {type(config).__name__}"
        )
    values = translate(config)
    if not set(values) & set(Config.model_fields):
        values = {"model": values}  # the keys of a model and of a run have no name in common
    if changes:
        model = values.get("model")
        given = model if isinstance(model, Mapping) else ModelConfig.model_validate(model or {}).model_dump()
        values["model"] = {**given, **changes}
    return load_config(values)


def refuse_unknown_name(source: str | os.PathLike[str]) -> None:
    """ConfigError, with what there is, for a word that names neither a file nor anything shipped."""
    path, names = Path(source), list(dict.fromkeys([*recipe_names(), *preset_names()]))
    if not path.suffix and len(path.parts) == 1 and str(source) not in names and not path.exists():
        raise ConfigError(
            f"{str(source)!r} is neither a file nor a recipe or preset; there are {', '.join(names)}"
            f"{nearest(str(source), names)}"
        )


def vocabulary(config: Config) -> tuple[int, Tokenizer | None]:
    """How many ids the model of ``config`` knows, and the tokenizer if they are its ids.

    TokenizerError if the number comes from a tokenizer that is not trained yet.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size, None
    from plait.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    return tokenizer.vocab_size, tokenizer


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)  # which is YAML too
    except TypeError:
        raise ConfigError(f"model.{key}: expected plain values; got a {type(value).__name__}") from None
