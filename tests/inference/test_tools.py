"""The calculator: what Python would print for arithmetic and counting, and nothing for anything else."""

from __future__ import annotations

import random
import time

import pytest

from plait.inference.tools import MOST_CHARACTERS, calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("6*7", "42"),
        (" 12 * (3 + 4) ", "84"),
        ("1/4", "0.25"),
        ("7//2", "3"),
        ("-3 - +2", "-5"),
        ("2.5*4", "10.0"),
        (".5+5.", "5.5"),
        ("1,234+1", "1235"),
        ("12,345,678 * 2", "24691356"),
        ("0.1+0.2", "0.30000000000000004"),
        ("'strawberry'.count('r')", "3"),
        ('"a,b,c".count(",")', "2"),
        ("'1,234'.count(',')", "1"),
        ("'日本日'.count('日')*2 + 1", "5"),
        ("'aaa'.count('')", "4"),
        ("'''aba'''.count('a')", "2"),
        ("+".join("1" * 150), "150"),
    ],
)
def test_what_is_computed(expression: str, result: str) -> None:
    assert calculate(expression) == result


def test_random_arithmetic_is_pythons() -> None:
    rng = random.Random(0)

    def term(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return rng.choice([str(rng.randint(0, 999)), f"{rng.random():.3f}", f"{rng.randint(1, 9)}."])
        left, right = term(depth - 1), term(depth - 1)
        one = f"{left} {rng.choice(['+', '-', '*', '/', '//'])} {right}"
        return rng.choice([one, f"({one})", f"-({one})"])

    results = 0
    for _ in range(300):
        expression = term(4)
        try:
            expected = str(eval(expression))
        except ArithmeticError:
            expected = None
        assert calculate(expression) == expected, expression
        results += expected is not None
    assert 100 < results < 300  # some divided by 0


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "x",
        "1 +",
        "1/0",
        "2**9",
        "9**9**9",
        "1,5",
        "1 if 1 else 2",
        "1<2",
        "True",
        "1e9",
        "0x10",
        "1_000",
        "007",
        "1.5.5",
        "5(3)",
        "5and 3",
        "1j",
        "[1][0]",
        "(1, 2)",
        "'a'",
        "'a'+'b'",
        "'a'*9",
        "'a'.upper()",
        "'a'.count",
        "'a'.count()",
        "'a'.count('a', 0)",
        "'a'.count(sub='a')",
        "'a'.count(*'a')",
        "'a'.count(1)",
        "1 .count('a')",
        "'a'.count('a').real",
        "f'{1}'.count('1')",
        "b'a'.count('a')",
        "'\\x41'.count('A')",
        "'a\n'.count('a')",
        "'\ud800'.count('a')",
        "__import__('os').system('true')",
        "().__class__",
        "exit()",
        "lambda: 1",
        "1\n2",
        "#1",
        "9" * 200 + ".0*" + "9" * 200,  # infinite
        "9" * 120,  # a result too long to be put into an answer
        "1" * (MOST_CHARACTERS + 1),
    ],
)
def test_what_is_not_computed_gives_nothing(expression: str) -> None:
    assert calculate(expression) is None


@pytest.mark.parametrize(
    "expression",
    [
        "1" * 499 + "x",
        "'" * 499,
        "1." * 249 + "x",
        "." * 499,
        " " * 499 + "x",
        "(" * 250 + "1" + ")" * 249,
        "-" * 499 + "1",
        "9" * 240 + "*" + "9" * 240 + "//7",
        "'" + "a" * 240 + "'.count('" + "a" * 240 + "')",
    ],
)
def test_no_expression_takes_long(expression: str) -> None:
    assert len(expression) <= MOST_CHARACTERS
    begin = time.process_time()
    calculate(expression)
    assert time.process_time() - begin < 1.0  # matching that goes back would take longer than anybody waits
