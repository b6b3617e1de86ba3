"""Turns what pydantic found wrong into one line: the place, what was expected and given, the nearest name."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from plait.config.errors import ConfigError, nearest

_BOUNDS = {
    "gt": "greater than",
    "ge": "at least",
    "lt": "less than",
    "le": "at most",
    "multiple_of": "a multiple of",
}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings", bool: "true or false"}


def explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The first thing wrong, as a ConfigError whose path begins at ``model``."""
    first = error.errors(include_url=False)[0]
    path, owner, field = _place(first["loc"], model)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.below(*path)
    if isinstance(cause, Exception):  # a validator of the section's own
        return ConfigError(str(cause), path)
    given = first["input"]
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return unknown_key(key, owner.model_fields, (*path, key))
    if field is None:
        return ConfigError(f"{first['msg']}; got {show(given)}", path)
    choices = [str(value) for leaf in leaves(field.annotation) for value in _choices(leaf)]
    return ConfigError(f"expected {describe(field)}; got {show(given)}{nearest(str(given), choices)}", path)


def unknown_key(key: str, allowed: Any, path: tuple[str | int, ...], more: str = "") -> ConfigError:
    """The error for a key that is not among ``allowed``; ``path`` ends with the key."""
    names = list(allowed)
    return ConfigError(f"unknown key; allowed: {', '.join(names)}{more}{nearest(key, names)}", path)


def describe(field: FieldInfo) -> str:
    """What a field accepts, in words: ``a whole number at least 1 or null``."""
    return " or ".join(dict.fromkeys(_describe_alternatives(field.annotation, field.metadata)))


def leaves(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, unions and Annotated taken apart."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from leaves(part)
    elif origin is Annotated:
        yield from leaves(get_args(annotation)[0])
    else:
        yield annotation


def show(value: Any) -> str:
    """A value as it may stand in an error line: its repr, cut to 60 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(
    loc: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[tuple[str | int, ...], Any, FieldInfo | None]:
    # A location of pydantic's also names the branch of a union that was tried; those parts are left out.
    path: list[str | int] = []
    owner: Any = model
    field: FieldInfo | None = None
    keyed = False  # the next part is a key of the user's own
    for part in loc:
        if isinstance(part, int) or keyed:
            path.append(part)
            keyed = False
        elif owner is not None and part in owner.model_fields:
            path.append(part)
            field = owner.model_fields[part]
            inner = list(_sections(field.annotation))
            owner = inner[0] if inner else None
            keyed = any(get_origin(leaf) is dict for leaf in leaves(field.annotation))
    return tuple(path), owner, field


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field holds: itself one, or a list or a mapping of them."""
    for leaf in leaves(annotation):
        if get_origin(leaf) in (list, dict):
            yield from _sections(get_args(leaf)[-1])
        elif isinstance(leaf, type) and issubclass(leaf, BaseModel):
            yield leaf


def _choices(leaf: Any) -> tuple[Any, ...]:
    return get_args(leaf) if get_origin(leaf) is Literal else ()


def _describe_alternatives(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for part in arguments:
            yield from _describe_alternatives(part, metadata)
    elif origin is Annotated:
        own = [
            x for item in arguments[1:] for x in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        yield from _describe_alternatives(arguments[0], [*metadata, *own])
    else:
        bounds = [
            f"{words} {getattr(item, name)}"
            for item in metadata
            for name, words in _BOUNDS.items()
            if getattr(item, name, None) is not None
        ]
        yield _describe_type(annotation, " and ".join(bounds))


def _describe_type(leaf: Any, bounds: str) -> str:
    origin, arguments = get_origin(leaf), get_args(leaf)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        inner = arguments[0] if arguments else Any
        count = f"{len(arguments)} " if origin is tuple and Ellipsis not in arguments else ""
        return f"a list of {count}{_PLURALS.get(inner, 'values')}"
    if isinstance(leaf, type) and issubclass(leaf, BaseModel):
        return f"a mapping of {', '.join(leaf.model_fields)}"
    words = _WORDS.get(leaf, "a list" if leaf is list else "a mapping" if leaf is dict else "a value")
    return f"{words} {bounds}" if bounds and leaf in (int, float) else words
