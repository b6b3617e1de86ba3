"""Objects named by strings, "module:name", and packages whose names are loaded when first used (PEP 562).

A lower floor names a higher one only by such a string, so that nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from plait.config.errors import ConfigError, nearest


def load_object(target: str) -> Any:
    """The object that ``"package.module:name"`` names.

    Raises ConfigError if the string has another form, or the module or the name does not exist. An error
    inside of the module is not hidden.
    """
    module_name, separator, name = target.partition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"{target!r} does not name an object; the form is 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise ConfigError(f"{target!r}: there is no module {error.name!r}") from None
    missing = object()
    found = getattr(module, name, missing)
    if found is missing:
        raise ConfigError(f"{target!r}: module {module_name!r} has no {name!r}{nearest(name, dir(module))}")
    return found


def lazy_names(
    package: str, targets: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a package whose names live elsewhere, ``{name: "module:name"}``."""

    def get(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, targets)}")
        value = load_object(targets[name])
        setattr(sys.modules[package], name, value)  # the next look-up does not come here
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *targets})

    return get, names
