"""What CONFIG and PATH on a command line mean: a file, a recipe, a preset, a run, or a folder with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.api import refuse_unknown_name, vocabulary
from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.schema import Config, ModelConfig


def read_config(source: str | None, changes: Sequence[str]) -> Config:
    """The run that a command line describes; a run's folder means its config.yaml.

    ConfigError names the file or the option that is wrong.
    """
    if source is None:
        if not changes:
            raise ConfigError(
                "no config is given: name a file or a recipe (see plait config list), or set values, as in "
                "--data.train=path/to/text"
            )
        return load_config(None, changes)
    path = Path(source)
    if path.is_dir():
        from plait.formats.folders import RUN_CONFIG

        if not (path / RUN_CONFIG).is_file():
            raise ConfigError(
                f"{path} is a folder without a {RUN_CONFIG}; give a config file, a recipe or a run"
            )
        return load_config(path / RUN_CONFIG, changes)
    refuse_unknown_name(source)
    return load_config(source, changes)


def read_model(source: str, changes: Sequence[str]) -> tuple[ModelConfig, str]:
    """The model, its vocabulary filled in, that a config or a folder with weights means; and a remark, or "".

    ConfigError, CheckpointError or TokenizerError say what is wrong.
    """
    path = Path(source)
    if path.is_dir():
        from plait.formats.folders import CHECKPOINTS, RUN_CONFIG, find_model_folder
        from plait.formats.native import read_model_config

        if (path / CHECKPOINTS).is_dir() or not (path / RUN_CONFIG).is_file():
            if changes:
                raise ConfigError(f"{changes[0]} changes a config, but {path} holds a trained model")
            return read_model_config(find_model_folder(path)), ""
    return with_vocabulary(read_config(source, changes))


def with_vocabulary(config: Config) -> tuple[ModelConfig, str]:
    """The model of a run with ``vocab_size`` set, and a remark if that is a guess."""
    from plait.tokenizers.load import DEFAULT_VOCAB_SIZE

    wanted = config.tokenizer
    if config.model.vocab_size is None and wanted.path is None and wanted.type != "bytes":
        guess = wanted.vocab_size or DEFAULT_VOCAB_SIZE
        remark = (
            f"the {wanted.type} tokenizer is trained with the model: a vocabulary of {guess} is assumed here"
        )
        return config.model.replace(vocab_size=guess), remark
    return config.model.replace(vocab_size=vocabulary(config)[0]), ""
