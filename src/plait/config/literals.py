"""Configs written as Python: assignments of literals, read from the syntax tree. Nothing is ever executed.

    _width = 20 * 64
    model = {"d_model": _width, "pattern": ["T"] * 12 + ["M"] * 8}

Allowed: literals, ``+ - * / // **`` of numbers, ``+`` and ``*`` of lists and strings, names assigned above.
Names that begin with ``_`` are helpers; all others are keys of the config.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from plait.config.errors import ConfigError, nearest

MOST_ITEMS = 100_000
_LARGEST = 2**63
_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
    ast.FloorDiv: ("//", operator.floordiv),
    ast.Pow: ("**", operator.pow),
}


def read_literals(text: str, source: str) -> dict[str, Any]:
    """The values that a Python file of literals assigns; ConfigError names ``source`` and the line."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        place = f"{source} line {line}" if line else source
        raise ConfigError(f"{place}: not valid Python: {getattr(error, 'msg', error)}") from None
    names: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        target, value = _assignment(statement, source)
        try:
            names[target] = _Reader(source, names).read(value)
        except RecursionError:
            raise ConfigError(f"{source} line {statement.lineno}: nested too deeply") from None
    return {name: value for name, value in names.items() if not name.startswith("_")}


def _assignment(statement: ast.stmt, source: str) -> tuple[str, ast.expr]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
        value: ast.expr | None = statement.value
    elif isinstance(statement, ast.AnnAssign):
        target, value = statement.target, statement.value
    else:
        target, value = ast.Constant(None), None
    if not isinstance(target, ast.Name) or value is None:
        raise ConfigError(
            f"{source} line {statement.lineno}: a config holds only assignments like `name = value`, "
            f"and is not executed; found {ast.unparse(statement).splitlines()[0][:60]!r}"
        )
    return target.id, value


class _Reader:
    """Evaluates expressions of literals; ``names`` are the values assigned so far."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source = source
        self.names = names

    def read(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.read(item) for item in node.elts]
        if isinstance(node, ast.Dict):
            return self._dict(node)
        if isinstance(node, ast.Name):
            if node.id not in self.names:
                raise self._error(
                    node, f"the name {node.id!r} is not assigned above{nearest(node.id, self.names)}"
                )
            return self.names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self.read(node.operand)
            if _is_number(value):
                return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._operation(node)
        raise self._error(
            node, "only literals, + - * / // ** and names assigned above are allowed; nothing is executed"
        )

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            value = self.read(value_node)
            if key_node is None:  # {**earlier, ...}
                if not isinstance(value, dict):
                    raise self._error(value_node, "** needs a dict")
                values.update(value)
                continue
            key = self.read(key_node)
            if not isinstance(key, str):
                raise self._error(key_node, "keys are strings")
            values[key] = value
        return values

    def _operation(self, node: ast.BinOp) -> Any:
        sign, function = _OPERATORS[type(node.op)]
        left, right = self.read(node.left), self.read(node.right)
        if _is_number(left) and _is_number(right):
            if sign == "**" and (abs(right) > 64 or abs(left) > _LARGEST):
                raise self._error(node, "the power is too large")
            try:
                result = function(left, right)
            except (ArithmeticError, ValueError) as error:
                raise self._error(node, str(error)) from None
            if isinstance(result, complex) or abs(result) > _LARGEST:
                raise self._error(node, "the result is not a number a config may hold")
            return result
        if sign == "+" and type(left) is type(right) and isinstance(left, list | str):
            size = len(left) + len(right)
        elif sign == "*" and isinstance(left, list | str) and type(right) is int:
            size = len(left) * right
        elif sign == "*" and isinstance(right, list | str) and type(left) is int:
            size = len(right) * left
        else:
            raise self._error(
                node, f"{sign} of {type(left).__name__} and {type(right).__name__} is not allowed"
            )
        if size > MOST_ITEMS:
            raise self._error(node, f"the result has {size} items; the most is {MOST_ITEMS}")
        return function(left, right)

    def _error(self, node: ast.expr, why: str) -> ConfigError:
        return ConfigError(f"{self.source} line {node.lineno}: {ast.unparse(node)[:60]!r}: {why}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
