"""YAML and JSON text to plain values and back, with errors that name the file and the line."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

from plait.config.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML's safe types; a key given twice is an error, and ``1e-4`` is a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str | int] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The value that YAML text holds; ConfigError naming ``source`` and the line if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping that YAML text holds; empty text is an empty mapping."""
    return as_config(parse_yaml(text, source), source)


def read_json(text: str, source: str) -> dict[str, Any]:
    """The mapping that JSON text holds; ConfigError naming ``source`` and the line if it is not JSON."""
    try:
        return as_config(json.loads(text, object_pairs_hook=_once), source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid JSON: nested too deeply") from None
    except _Twice as error:
        raise ConfigError(f"{source}: the key {error.args[0]!r} is given twice") from None


def to_yaml(value: Any) -> str:
    """Plain values as YAML text that reads back as the same values, keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)


def as_config(value: Any, source: str) -> dict[str, Any]:
    """``value`` if it is a mapping with names as keys, {} for nothing; else ConfigError naming ``source``."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: a config is a mapping of sections; this is a {type(value).__name__}")
    return value


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it: tuples as lists, an infinity as its name."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Twice(key)
        values[key] = value
    return values
