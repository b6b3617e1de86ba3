"""The pattern language: which mixer sits where, first layer to last.

    pattern := item+                    "M2*3 T M2*3 T"
    item    := name | "(" item+ ")", optionally followed by "*" and a count       "(M M T)*4"

Items are separated by spaces or commas. A list may hold such strings, and mappings such as
``{mixer: mamba2, d_state: 128, mlp: none}`` for one layer with options of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plait.config.errors import ConfigError
from plait.config.explain import show
from plait.config.table import canonical

MOST_LAYERS = 10_000
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_][\w-]*)|(?P<count>\d+)|(?P<mark>[()*,])|(?P<wrong>\S))")

_RUN_TOGETHER = re.compile(r"(?:[TM][123]?){2,}", re.IGNORECASE)


@dataclass(frozen=True)
class PatternEntry:
    """One layer: the kind of its mixer, its own options, and which item of a list it came from."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    item: int | None = None


def parse_pattern(value: str | list[Any] | tuple[Any, ...]) -> list[PatternEntry]:
    """The layers that a pattern names; ConfigError, with the place in it, if it is not one."""
    if isinstance(value, str):
        entries = _Parser(value).parse()
    elif isinstance(value, list | tuple):
        entries = []
        for index, item in enumerate(value):
            try:
                entries += [replace(entry, item=index) for entry in _parse_item(item)]
            except ConfigError as error:
                raise error.below(index) from None
    else:
        raise ConfigError(f"expected a string like 'M2*3 T' or a list of kinds; got {show(value)}")
    if not entries:
        raise ConfigError("the pattern names no layer; give at least one, such as 'T'")
    if len(entries) > MOST_LAYERS:
        raise ConfigError(f"the pattern has {len(entries)} layers; the most is {MOST_LAYERS}")
    return entries


def is_single_name(value: Any) -> bool:
    """Whether a pattern is one name alone, which stands for as many layers as the model has."""
    return isinstance(value, str) and re.fullmatch(r"\s*[A-Za-z_][\w-]*\s*", value) is not None


def _parse_item(item: Any) -> list[PatternEntry]:
    if isinstance(item, str):
        return _Parser(item).parse()
    if not isinstance(item, Mapping):
        raise ConfigError(f"expected a kind of mixer or a mapping {{mixer: ..., ...}}; got {show(item)}")
    if "mixer" not in item:
        raise ConfigError(
            f"the mapping has no key 'mixer', which names the kind; its keys: {', '.join(map(str, item))}"
        )
    if not isinstance(item["mixer"], str):
        raise ConfigError(f"expected the name of a kind; got {show(item['mixer'])}", ("mixer",))
    try:
        kind = canonical(item["mixer"])
    except ConfigError as error:
        raise error.below("mixer") from None
    return [PatternEntry(kind, {key: value for key, value in item.items() if key != "mixer"})]


class _Parser:
    """Recursive descent over the tokens of one string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [
            (match.lastgroup or "", match[match.lastgroup or 0]) for match in _TOKEN.finditer(text)
        ]
        self.at = 0

    def parse(self) -> list[PatternEntry]:
        entries = self._sequence()
        if self.at < len(self.tokens):
            raise self._wrong(
                "it has no opening bracket" if self._peek() == ")" else "it does not belong here"
            )
        return entries

    def _sequence(self) -> list[PatternEntry]:
        entries: list[PatternEntry] = []
        while self.at < len(self.tokens):
            group, token = self.tokens[self.at]
            if token == ",":
                self.at += 1
            elif group == "name":
                entries += self._times([PatternEntry(self._kind(token))])
            elif token == "(":
                entries += self._times(self._brackets())
            else:
                break
        return entries

    def _brackets(self) -> list[PatternEntry]:
        opening = self.at
        self.at += 1
        inside = self._sequence()
        if self._peek() != ")":
            if self.at < len(self.tokens):
                raise self._wrong("it does not belong here")
            self.at = opening
            raise self._wrong("it is never closed")
        if not inside:
            raise self._wrong("the brackets hold no layer")
        return inside

    def _times(self, entries: list[PatternEntry]) -> list[PatternEntry]:
        self.at += 1
        if self._peek() != "*":
            return entries
        self.at += 1
        if self.at == len(self.tokens) or self.tokens[self.at][0] != "count":
            self.at -= 1
            raise self._wrong("a count must follow, as in 'M2*3'")
        count = int(self.tokens[self.at][1])
        if count == 0:
            raise self._wrong("a count is at least 1")
        if count * len(entries) > MOST_LAYERS:
            raise self._wrong(f"the most layers are {MOST_LAYERS}")
        self.at += 1
        return entries * count

    def _kind(self, name: str) -> str:
        try:
            return canonical(name)
        except ConfigError as error:
            hint = "; separate the names by spaces" if _RUN_TOGETHER.fullmatch(name) else ""
            raise ConfigError(f"in {show(self.text)}: {error.text}{hint}") from None

    def _peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"in {show(self.text)}, item {self.at + 1} ({self._peek()!r}): {why}")
