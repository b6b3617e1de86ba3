"""THE TABLE of mixers: every kind, its short names, and where its class is.

A new mixer is one file and one line here.
Kinds and aliases are compared without regard to case, and ``-`` equals ``_``. Other packages add kinds by the
entry-point group "plait.mixers" (name = kind, value = "module:Class") or by ``register_mixer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from plait.config.errors import ConfigError, nearest
from plait.config.lazy import load_object

if TYPE_CHECKING:
    from plait.config.options import Options

ENTRY_POINTS = "plait.mixers"


@dataclass(frozen=True)
class MixerEntry:
    """A kind of mixer: its name, other names for it, and its class or ``"module:Class"``."""

    kind: str
    aliases: tuple[str, ...]
    target: str | type


TABLE: dict[str, MixerEntry] = {
    entry.kind: entry
    for entry in (
        MixerEntry("attention", ("T", "transformer", "attn"), "plait.mixers.attention:Attention"),
        MixerEntry("mamba", ("M", "mamba1"), "plait.mixers.mamba:Mamba"),
        MixerEntry("mamba2", ("M2",), "plait.mixers.mamba2:Mamba2"),
        MixerEntry("mamba3", ("M3",), "plait.mixers.mamba3:Mamba3"),
        MixerEntry("s4d", ("S4",), "plait.mixers.s4d:S4D"),
        MixerEntry("rnn", (), "plait.mixers.rnn:RNN"),
        MixerEntry("gru", (), "plait.mixers.gru:GRU"),
        MixerEntry("lstm", (), "plait.mixers.lstm:LSTM"),
    )
}

# A kind's section stands beside these keys in `model:`, its options beside the block's; neither may collide.
MODEL_KEYS = frozenset(
    {
        "preset",
        "d_model",
        "n_layer",
        "pattern",
        "block_pattern",
        "vocab_size",
        "pad_vocab_size_multiple",
        "causal",
    }
    | {"norm", "residual", "mlp", "dropout", "linear", "embedding", "final_norm", "head", "backout"}
    | {"init", "init_std"}
)
BLOCK_KEYS = frozenset({"norm", "residual", "mlp", "dropout", "linear"})


def kinds() -> tuple[str, ...]:
    """All kinds of mixers, those of other packages last."""
    _load_entry_points()
    return tuple(TABLE)


def find_kind(name: str) -> str | None:
    """The kind that a name or an alias means, or None."""
    _load_entry_points()
    plain = _plain(name)
    for entry in TABLE.values():
        if plain in (entry.kind, *map(_plain, entry.aliases)):
            return entry.kind
    return None


def canonical(name: str) -> str:
    """The kind that a name or an alias means; ConfigError, with the known ones, if none does."""
    kind = find_kind(name)
    if kind is None:
        known = [f"{e.kind} ({', '.join(e.aliases)})" if e.aliases else e.kind for e in TABLE.values()]
        names = [n for e in TABLE.values() for n in (e.kind, *e.aliases) if len(n) > 2]
        raise ConfigError(f"{name!r} is not a kind of mixer; known: {', '.join(known)}{nearest(name, names)}")
    return kind


def mixer_class(kind: str) -> Any:
    """The class of a kind (or alias); its module is imported now."""
    target = TABLE[canonical(kind)].target
    return load_object(target) if isinstance(target, str) else target


def options_class(kind: str) -> type[Options]:
    """The class of a kind's options; ConfigError if one has the name of a block option."""
    return _options_of(mixer_class(kind), canonical(kind))


def register_mixer(kind: str, target: str | type, aliases: Sequence[str] = ()) -> None:
    """Add a kind to the table: ``target`` is the mixer's class or ``"module:Class"``.

    Raises ConfigError if the kind or an alias is taken, or is a key of the model's config. Registering the
    same entry again does nothing.
    """
    entry = MixerEntry(_plain(kind), tuple(aliases), target)
    if TABLE.get(entry.kind) == entry:
        return
    for name in (entry.kind, *map(_plain, aliases)):
        if not name.isidentifier():
            raise ConfigError(
                f"{name!r} cannot name a mixer: it must be letters, digits and _, a letter first"
            )
        if name in MODEL_KEYS:
            raise ConfigError(f"{name!r} cannot name a mixer: it is a key of the model's config")
        taken = find_kind(name)
        if taken is not None:
            raise ConfigError(f"{name!r} already names the mixer {taken!r}; choose another name")
    TABLE[entry.kind] = entry


@contextmanager
def temporary_mixer(kind: str, target: str | type, aliases: Sequence[str] = ()) -> Iterator[None]:
    """``register_mixer`` for the length of a ``with`` block (for tests and notebooks)."""
    register_mixer(kind, target, aliases)
    try:
        yield
    finally:
        del TABLE[_plain(kind)]


@cache
def _options_of(mixer: Any, kind: str) -> type[Options]:
    options: type[Options] = mixer.options_class
    clash = sorted(BLOCK_KEYS & set(options.model_fields))
    if clash:
        raise ConfigError(
            f"the mixer {kind!r} has an option {clash[0]!r}, the name of an option of every block; rename it"
        )
    return options


@cache
def _load_entry_points() -> None:
    # Once a process, when the table is first asked: reading the packages' metadata takes milliseconds.
    for point in entry_points(group=ENTRY_POINTS):
        name = _plain(point.name)
        if name not in TABLE and name not in MODEL_KEYS:
            TABLE[name] = MixerEntry(name, (), point.value)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")
