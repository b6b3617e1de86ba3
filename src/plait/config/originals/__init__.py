"""The originals' own configs: recognised by their keys, and translated into our schema; data to data, nothing built.

An original is a line of the table and a module here with two functions:

    recognise(values) -> bool     whether a raw config is this original's; False for every config of Plait's own
    translate(values) -> dict     the same run in our schema, raw; ConfigError, its path in the original's own
                                  names, for a key that is unknown or cannot be honoured
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.config.lazy import load_object

ORIGINALS: dict[str, str] = {
    "foundry": "plait.config.originals.foundry",
    "nanochat": "plait.config.originals.nanochat",
    "minimamba": "plait.config.originals.minimamba",
}


def recognise(values: Mapping[str, Any]) -> str | None:
    """The name of the original whose config ``values`` is, or None."""
    return next(
        (name for name, module in ORIGINALS.items() if load_object(f"{module}:recognise")(values)), None
    )


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The run that an original's config describes, in our schema; any other config as it is.

    ConfigError names the key, as the original calls it, that is wrong or that Plait cannot honour.
    """
    name = recognise(values)
    if name is None:
        return dict(values)
    translated: dict[str, Any] = load_object(f"{ORIGINALS[name]}:translate")(values)
    return translated
