"""The calculator that a model may call while it answers: arithmetic, and counting in a text. Nothing is executed.

An expression is parsed (``ast``) and computed by the few operations below. It cannot take long: it has at most
``MOST_CHARACTERS`` characters, there are no powers, and so no number grows much longer than the expression.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

MOST_CHARACTERS = 500
MOST_DEPTH = 200  # of operations within operations
MOST_RESULT = 100  # characters of a result, so that it does not fill the context

Tool = Callable[[str], str | None]  # an expression -> its result, or None if it has none
Number = int | float

_OPERATIONS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# What the parser gets to see: numbers, strings without escapes, operators, and the one method; no name, no keyword.
# Every repetition is possessive, so that matching takes linear time.
_WORDS = re.compile(
    r"""(?:\s|\d++(?:\.\d*+)?+|\.\d++|'[^'\\\n]*+'|"[^"\\\n]*+"|\.\s*+count\b|[-+*/(),])*+""", re.ASCII
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))", re.ASCII)


def calculate(expression: str) -> str | None:
    """The value of an expression as Python prints it, or None if it is none that is computed here.

    Numbers (``1,234`` is one) with + - * / // and parentheses, or ``'text'.count('part')``, within arithmetic too.
    """
    if len(expression) > MOST_CHARACTERS or not _WORDS.fullmatch(expression):
        return None
    if "'" not in expression and '"' not in expression:
        expression = _THOUSANDS.sub("", expression)
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, 0)
    except (_NotComputedError, SyntaxError, ArithmeticError, ValueError, MemoryError, RecursionError):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    result = str(value)
    return result if len(result) <= MOST_RESULT else None


class _NotComputedError(Exception):
    """An expression of a form that is not computed."""


def _value(node: ast.expr, depth: int) -> Number:
    if depth > MOST_DEPTH:
        raise _NotComputedError
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return value  # type: ignore[return-value]
        case ast.UnaryOp(op=sign, operand=inner) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_value(inner, depth + 1))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_value(left, depth + 1), _value(right, depth + 1))
        case ast.Call(func=ast.Attribute(value=text, attr="count"), args=[part], keywords=[]):
            return _string(text).count(_string(part))
    raise _NotComputedError


def _string(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise _NotComputedError
