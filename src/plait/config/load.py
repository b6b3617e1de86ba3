"""Reads a config from any of its front doors, and writes one that runs the same run again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.config.errors import ConfigError, nearest
from plait.config.literals import read_literals
from plait.config.originals import translate
from plait.config.overrides import apply_overrides
from plait.config.recipes import preset_names, read_recipe, recipe_names
from plait.config.schema import Config
from plait.config.text import read_json, read_yaml, to_yaml

_READERS = {".yaml": read_yaml, ".yml": read_yaml, ".json": read_json, ".py": read_literals}


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The run that ``source`` describes, with ``overrides`` such as ``"--training.lr=1e-3"`` set on top.

    ``source`` is a file (YAML, JSON, or Python literals), the name of a shipped recipe or preset, a mapping,
    a config, or None for the defaults. A file or mapping may also be one of an original's own configs, which is
    translated; overrides are always in our names. Whatever is wrong is a ConfigError of one line, which names the file.
    """
    name, data = _read(source)
    try:
        data = translate(data)
    except ConfigError as error:
        raise error if name is None else ConfigError(f"{name}: {error}") from None
    changed = apply_overrides(data, overrides)
    try:
        return Config.model_validate(changed)
    except ConfigError as error:
        if name is None or (overrides and not _wrong_by_itself(data)):
            raise  # it is an override that is wrong, not the file
        raise ConfigError(f"{name}: {error}") from None


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write every value of ``config`` as YAML that ``load_config`` reads back as an equal config."""
    Path(path).write_text(config_yaml(config), encoding="utf-8")


def config_yaml(config: Config) -> str:
    """Every value of ``config`` as YAML."""
    return to_yaml(config.to_dict())


def _read(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config | None,
) -> tuple[str | None, dict[str, Any]]:
    if source is None:
        return None, {}
    if isinstance(source, Config):
        return None, source.to_dict()
    if isinstance(source, Mapping):
        return None, dict(source)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"a config is a path, a name, a mapping or a Config; got a {type(source).__name__}")
    path = Path(source)
    if isinstance(source, str) and not path.suffix and os.sep not in source and not path.exists():
        if source in preset_names() and source not in recipe_names():
            return None, {"experiment_name": source, "model": {"preset": source}}
        return f"recipe {source}", read_recipe(source)
    return str(path), read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """What a config file holds, raw: nothing translated, nothing validated but its form."""
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the config file in it")
    if reader is None:
        raise ConfigError(f"{path}: a config ends with one of {', '.join(_READERS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: there is no such file{nearest(path.name, beside)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return reader(text, str(path))


def _wrong_by_itself(data: dict[str, Any]) -> bool:
    try:
        Config.model_validate(data)
    except ConfigError:
        return True
    return False
