"""The base class of every section of the config: strict, frozen, with errors that a person can act on.

Types are lax in what they read (``"1e-4"`` is a number, as YAML gives it) and strict in what they accept:
unknown keys, a bool for a number, NaN and infinities are errors. Whatever pydantic finds wrong leaves as one
ConfigError.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from plait.config.errors import ConfigError
from plait.config.explain import describe, explain, leaves, show


class Section(BaseModel):
    """A frozen set of named values with defaults; two are equal if their values are."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="strings"
    )

    # Keys that keep their meaning when `kind` changes; `merge` drops the others with the old kind.
    kind_free: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise explain(error, type(self)) from None

    # pydantic asks this of an __init__: it adds nothing, so nested sections are validated without calling it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """The section that a mapping (or another section) describes; ConfigError if it describes none."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise explain(error, cls) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """The section that a JSON object describes; ConfigError if it describes none."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise explain(error, cls) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(f"a config is never changed; make another one with .replace({name}=...)", (name,))

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """What was given in its long form: shorthands spelled out, aliases replaced; for subclasses."""
        return data

    @classmethod
    def merge(cls, base: Any, over: Any) -> dict[str, Any]:
        """``over`` laid on ``base`` (both raw), section by section; lists and values are replaced.

        When ``over`` changes the ``kind`` of a section, what the base says about the old kind is dropped.
        """
        below = as_mapping(cls.normalise(base))
        above = as_mapping(cls.normalise(over))
        if "kind" in above and "kind" in below and above["kind"] != below["kind"]:
            below = {key: value for key, value in below.items() if key in cls.kind_free}
        merged = dict(below)
        for key, value in above.items():
            section = cls.subsection(key)
            try:
                merged[key] = section.merge(below[key], value) if section and key in below else value
            except ConfigError as error:
                raise error.below(key) from None
        return merged

    @classmethod
    def subsection(cls, key: str) -> type[Section] | None:
        """The class of the section that stands at ``key``, or None if a plain value does."""
        field = cls.model_fields.get(key)
        found = [] if field is None else [leaf for leaf in leaves(field.annotation) if _is_section(leaf)]
        return found[0] if found else None

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed, validated like any other; sections may be given as dicts."""
        data = {key: value for key, value in self if key not in changes}
        return type(self)(**data, **changes)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        data = cls.normalise(data)
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a mapping of {', '.join(cls.model_fields)}; got {show(data)}")
        read: dict[str, Any] = {}
        for key, value in data.items():
            if not isinstance(key, str):
                raise ConfigError(f"keys are names; got {show(key)}")
            field = cls.model_fields.get(key)
            read[key] = value if field is None else _number(_paths_as_text(value), field, key)
        return read


def as_mapping(value: Any) -> dict[str, Any]:
    """A raw section as a dict; one that is already validated gives its values, None nothing."""
    if isinstance(value, Section):
        return value.model_dump()
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a mapping of keys to values; got {show(value)}")
    return dict(value)


def _is_section(leaf: Any) -> bool:
    return isinstance(leaf, type) and issubclass(leaf, Section)


def _paths_as_text(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(item, os.PathLike) for item in value):
        return [_paths_as_text(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _number(value: Any, field: FieldInfo, key: str) -> Any:
    # What pydantic's lax mode gets wrong for numbers: true is 1, "1e4" is no int, NaN passes every bound.
    types = set(leaves(field.annotation))
    if not types & {int, float} or types & {bool, str, Any}:
        return value
    huge = isinstance(value, int) and abs(value) >= 1 << 63
    if isinstance(value, bool) or huge or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"expected {describe(field)}; got {show(value)}", (key,))
    if isinstance(value, str) and float not in types:
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value
