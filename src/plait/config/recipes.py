"""The YAML files that Plait ships: presets (a model) and recipes (a run).

Of equal names the recipe trains the preset, perhaps at another size.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from plait.config.errors import ConfigError, nearest
from plait.config.text import read_yaml


def recipe_names() -> list[str]:
    """The shipped runs, by name."""
    return _names(_folder())


def preset_names() -> list[str]:
    """The shipped models, by name."""
    return _names(_folder() / "presets")


def read_recipe(name: str) -> dict[str, Any]:
    """A shipped run as a plain mapping; ConfigError, with the names there are, if it is not one.

    A file that names another ``recipe`` is that one, but for the sections that it has itself.
    """
    values = _read(_folder(), name, recipe_names(), "recipe")
    base = values.pop("recipe", None)
    return values if base is None else read_recipe(base) | values


def read_preset(name: str) -> dict[str, Any]:
    """A shipped model as a plain mapping; ConfigError, with the names there are, if it is not one."""
    return _read(_folder() / "presets", name, preset_names(), "preset")


def _folder() -> Traversable:
    return files("plait") / "recipes"


def _names(folder: Traversable) -> list[str]:
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _read(folder: Traversable, name: str, names: list[str], what: str) -> dict[str, Any]:
    if name not in names:
        raise ConfigError(f"{name!r} is not a {what}; there are {', '.join(names)}{nearest(name, names)}")
    return read_yaml((folder / f"{name}.yaml").read_text(encoding="utf-8"), f"{what} {name}")
