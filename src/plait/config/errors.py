"""The errors a user may cause. Each is one clear line: what was given, what is allowed, what to do.

The command line prints a ``PlaitError`` as ``error: ...`` and exits 1; all others are faults of Plait's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlaitError(Exception):
    """A user's mistake, or something outside of Plait that went wrong."""


class ConfigError(PlaitError, ValueError):
    """A config that says something it may not; ``path`` is the place, as keys and list indices."""

    def __init__(self, text: str, path: tuple[str | int, ...] = ()) -> None:
        self.text = text
        self.path = path
        place = dotted(path)
        super().__init__(f"{place}: {text}" if place else text)

    def below(self, *prefix: str | int) -> ConfigError:
        """The same error seen from further out: its path begins with ``prefix``."""
        return ConfigError(self.text, (*prefix, *self.path))


class BackendError(PlaitError):
    """A backend of an op was asked for that cannot run here."""


class BuildError(PlaitError, ValueError):
    """A model that cannot be built or used as asked."""


class CapacityError(PlaitError):
    """More tokens than a cache or a table of positions holds."""


class DataError(PlaitError):
    """Text, token ids or shards that cannot be read or do not fit."""


class TokenizerError(PlaitError):
    """A tokenizer that cannot be loaded, trained or used."""


class CheckpointError(PlaitError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(PlaitError):
    """Training that cannot begin or go on."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the most similar allowed name, or an empty string."""
    originals: dict[str, str] = {}
    for candidate in allowed:
        originals.setdefault(_plain(candidate), candidate)
    found = difflib.get_close_matches(_plain(str(name)), originals, n=1, cutoff=0.6)
    return f" (did you mean {originals[found[0]]!r}?)" if found else ""


def dotted(path: Iterable[str | int]) -> str:
    """``("model", "pattern", 2, "d_state")`` as ``model.pattern[2].d_state``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
