"""A command line of nanochat's scripts: a config file, and settings under nanochat's names.

    configs/mamba_d20.py --device_batch_size=4 --max-seq-len 1024 -- --data.train=path/to/text

Read as data: a file of literals is never executed. A setting that does not exist is an error. Names with a dot,
and those of whole sections (--tokenizer=...), are of Plait's own config, and are laid on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from plait.config.errors import ConfigError, nearest
from plait.config.explain import leaves
from plait.config.literals import read_literals
from plait.config.load import read_config_file
from plait.config.originals.nanochat import BaseTrain, release_of
from plait.config.originals.nanochat2026 import BaseTrain2026
from plait.config.overrides import override_pairs
from plait.config.schema import Config
from plait.config.section import Section

SHIPPED = "plait.compat.nanochat.configs"


@dataclass
class CommandLine:
    """What a command line says."""

    settings: dict[str, Any] = field(default_factory=dict)  # nanochat's, the file's and then the options'
    overrides: list[str] = field(default_factory=list)  # of Plait's config, --section.key=value
    source: str | None = None  # the config file


def read_command_line(words: Sequence[str], settings: type[Section]) -> CommandLine:
    """The settings of a section's names that ``words`` give; ConfigError for a name that it has not.

    ``configs/NAME.py`` that is not there means the file of that name that is shipped.
    """
    line = CommandLine()
    names = set(settings.model_fields)
    positional, options = _split(words)
    if len(positional) > 1:
        raise ConfigError(f"one config file at most; got {', '.join(positional)}")
    for name in positional:
        line.source = name
        line.settings.update(read_config_file(_found(name)))
    for name, text in override_pairs(options):
        key = name.replace("-", "_")
        if key in names:
            line.settings[key] = _value(text, key, settings)
        elif "." in name or key in Config.model_fields:
            line.overrides.append(f"--{name}" if text is None else f"--{name}={text}")
        else:
            if key in BaseTrain2026.model_fields and issubclass(settings, BaseTrain):
                raise ConfigError(f"--{name} is a setting of July 2026: add --release=2026")
            raise ConfigError(
                f"there is no setting {name!r}{nearest(key, names)}; there are {', '.join(sorted(names))}"
            )
    return line


def release_of_line(words: Sequence[str]) -> int:
    """Which nanochat a command line speaks of, by its ``release`` or its file's; 2025 if neither says."""
    positional, options = _split(words)
    given = [read_config_file(_found(name)) for name in positional]
    given += [{"release": text} for name, text in override_pairs(options) if name == "release"]
    found = [values["release"] for values in given if "release" in values]
    return release_of({"release": found[-1]} if found else {})


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, options): a word is a file unless it begins with --, has a = or follows an option without one."""
    positional: list[str] = []
    options: list[str] = []
    before = "--"
    for word in words:
        alone = before == "--" or not before.startswith("--") or "=" in before
        (positional if alone and not word.startswith("--") and "=" not in word else options).append(word)
        before = word
    return positional, options


def _found(name: str) -> Path:
    path = Path(name)
    if path.exists() or path.parent != Path("configs"):
        return path
    shipped = Path(str(files(SHIPPED))) / path.name
    return shipped if shipped.is_file() else path


def _value(text: str | None, key: str, settings: type[Section]) -> Any:
    types = set(leaves(settings.model_fields[key].annotation))
    if text is None:
        if types == {bool}:
            return True
        raise ConfigError(f"--{key}: a value must follow, as in --{key}=...")
    if types == {str}:
        return text
    try:
        return read_literals(f"value = {text}", key)["value"]
    except ConfigError:
        return text  # no literal; the section says what it wants instead
