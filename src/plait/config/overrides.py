"""Values from the command line: ``--training.lr=1e-3``, ``--training.lr 1e-3``, ``training.lr=1e-3``.

``-`` and ``_`` are alike in names. A value is read as YAML, except where the schema wants a string.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from plait.config.block import BlockConfig
from plait.config.errors import ConfigError, nearest
from plait.config.explain import leaves
from plait.config.model import ModelConfig
from plait.config.schema import Config
from plait.config.section import Section, as_mapping
from plait.config.table import find_kind, kinds
from plait.config.text import parse_yaml

_LENGTHS = (
    "steps",
    "epochs",
    "tokens_per_parameter",
    "flops",
)  # of a run; any of the last three overrules steps


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the raw config ``data`` with the overrides set in order; ConfigError for an unknown path."""
    for name, text in override_pairs(overrides):
        path, field_types = _resolve(name)
        value = _value(text, field_types, name)
        data = _set(data, path, Config, value, name)
        if path[:-1] == ["training"] and path[-1] in _LENGTHS and value is not None:
            # what says how long the run is replaces whatever said so before, which would overrule it silently
            others = {other: None for other in _LENGTHS[1:] if other != path[-1]}
            data["training"] = {**data["training"], **others}
    return data


def option_paths() -> list[str]:
    """Every path of the schema that an override may set, dotted; sections of kinds by their name alone."""
    return [*_paths(Config, ""), *(f"model.{kind}" for kind in kinds())]


def override_pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, text) of each override in any of its forms; the text is None where none follows. A lone -- is skipped."""
    words: list[str] = []
    for item in overrides:
        head, space, tail = item.partition(" ")
        words += [head, tail.strip()] if space and item.startswith("--") and "=" not in head else [item]
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        if equals:
            yield name, text
        elif not word.startswith("--"):
            raise ConfigError(f"{word!r} is not an override; the form is --section.key=value")
        elif at < len(words) and not words[at].startswith("--"):
            yield name, words[at]
            at += 1
        else:
            yield name, None


def _resolve(name: str) -> tuple[list[str], set[Any]]:
    """The keys that a dotted name means, and the types its field allows (unknown for options of a kind)."""
    parts = [part.replace("-", "_") for part in name.strip().split(".")]
    path: list[str] = []
    section: type[Section] | None = Config
    types: set[Any] = {dict}
    for part in parts:
        if section is None:
            raise ConfigError(f"--{name}: {'.'.join(path)} is a value and has no keys below it")
        key, kind = part.lower() if part.lower() in section.model_fields else part, None
        if section is ModelConfig:
            key = "pattern" if key == "block_pattern" else key
            kind = None if key in section.model_fields else find_kind(part)
        field = section.model_fields.get(key)
        if kind is not None:
            return _resolve_in_kind([*path, kind], parts[len(path) + 1 :], name)
        if field is None:
            raise _unknown(name, parts)
        path.append(key)
        types = set(leaves(field.annotation))
        section = section.subsection(key)
    return path, types


def _resolve_in_kind(path: list[str], rest: list[str], name: str) -> tuple[list[str], set[Any]]:
    # The kind's own options are known only to its module, which validation imports; here the block's are.
    if not rest:
        return path, {dict}
    field = BlockConfig.model_fields.get(rest[0])
    section = BlockConfig.subsection(rest[0])
    if len(rest) > 2 or (len(rest) == 2 and section is None):
        raise ConfigError(f"--{name}: {'.'.join([*path, rest[0]])} is a value and has no keys below it")
    if len(rest) == 2 and section is not None:
        field = section.model_fields.get(rest[1])
        if field is None:
            allowed = list(section.model_fields)
            raise ConfigError(
                f"--{name}: unknown key; allowed: {', '.join(allowed)}{nearest(rest[1], allowed)}"
            )
    return [*path, *rest], set() if field is None else set(leaves(field.annotation))


def _unknown(name: str, parts: list[str]) -> ConfigError:
    known = option_paths()
    same_leaf = [path for path in known if path.rsplit(".", 1)[-1] == parts[-1]]
    hint = nearest(".".join(parts), known) or (f" (did you mean {same_leaf[0]!r}?)" if same_leaf else "")
    if not hint:
        leaf = nearest(parts[-1], [path.rsplit(".", 1)[-1] for path in known])
        hint = leaf or f"; sections: {', '.join(Config.model_fields)}"
    return ConfigError(f"--{name}: the config has no such key{hint}")


def _value(text: str | None, types: set[Any], name: str) -> Any:
    if text is None:
        if bool in types:
            return True
        raise ConfigError(f"--{name}: a value must follow, as in --{name}=...")
    if str in types and not text.startswith(("[", "{")):
        return None if text in ("null", "~") and type(None) in types else text
    return parse_yaml(text, f"--{name}")


def _set(
    data: Any, path: Sequence[str], section: type[Section] | None, value: Any, name: str
) -> dict[str, Any]:
    """``data`` with ``value`` at ``path``; shorthands and aliases on the way are spelled out."""
    if section is not None and section is not ModelConfig:
        data = section.normalise(data)
    try:
        changed = as_mapping(data)
    except ConfigError as error:
        raise ConfigError(f"--{name}: {error}") from None
    key = path[0]
    if section is ModelConfig:
        changed = {_model_key(str(old)): item for old, item in changed.items()}
    if len(path) == 1:
        changed[key] = value
    else:
        inner = section.subsection(key) if section else None
        if section is ModelConfig and key not in ModelConfig.model_fields:
            inner = BlockConfig
        changed[key] = _set(changed.get(key, {}), path[1:], inner, value, name)
    return changed


def _model_key(key: str) -> str:
    if key == "block_pattern":
        return "pattern"
    return key if key in ModelConfig.model_fields else find_kind(key) or key


def _paths(section: type[Section], prefix: str) -> Iterator[str]:
    for name in section.model_fields:
        inner = section.subsection(name)
        yield prefix + name
        if inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")
