"""docs/originals.md has a line for every row and every defect of the originals, and names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "originals.md").read_text(encoding="utf-8")
ROWS = [
    *(f"A-{n}" for n in range(1, 20)),
    *(f"B-{n}" for n in range(1, 12)),
    "B-10b",
    *(f"C-{n}" for n in range(1, 10)),
    "C-8b",
    *(f"D-{n}" for n in range(1, 7)),
]
DEFECTS = [
    f"{letter} {n}" for letter, most in zip("ABCD", (18, 13, 13, 9), strict=True) for n in range(1, most + 1)
]
# How the functions of a file name the defects of a system, so that each test is named after its own.
NAMES = {
    "A": r"test_(defect_{n}|a{n})_",
    "B": r"test_(b?{n})_",
    "C": r"test_c{n}_",
    "D": r"test_d{n}_",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def lines_of(text: str, key: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and cells(line)[0] == key]


def named(text: str) -> list[str]:
    """The tests, or whole files of tests, that a text names."""
    return re.findall(r"`(tests/[\w/]+\.py(?:::\w+)*)`", text)


@cache
def functions(path: str) -> frozenset[str]:
    """The tests of a file: test_x, and TestX::test_y."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + item.name for item in inner if isinstance(item, ast.FunctionDef)}
    return frozenset(name for name in found if name.rsplit("::", 1)[-1].startswith("test_"))


def exists(test: str) -> bool:
    path, _, name = test.partition("::")
    return (ROOT / path).is_file() and (not name or name in functions(path))


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_line_and_a_test(row: str) -> None:
    lines = lines_of(TABLE, row)
    assert len(lines) == 1, f"{row} has {len(lines)} lines"
    _, what, here, tests = cells(lines[0])
    assert what and here
    shown = named(tests)
    assert shown and all("::" in test for test in shown), f"{row} names no test"
    assert not re.sub(r"`[^`]*`", "", tests).strip(), f"{row}: {tests} holds something else than tests"


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_has_a_test_that_is_named_after_it(defect: str) -> None:
    lines = lines_of(TABLE, defect)
    assert len(lines) == 1, f"{defect} has {len(lines)} lines"
    letter, number = defect.split()
    own = re.compile(NAMES[letter].format(n=number))
    tests = named(lines[0])
    assert any(own.match(test.rsplit("::", 1)[-1]) for test in tests), f"no test of {defect} has its name"


def test_there_is_nothing_else_in_the_tables() -> None:
    keys = {cells(line)[0] for line in TABLE.splitlines() if line.startswith("|")}
    assert {key for key in keys if re.fullmatch(r"[A-D]-\d+b?", key)} == set(ROWS)
    assert {key for key in keys if re.fullmatch(r"[A-D] \d+", key)} == set(DEFECTS)


def test_every_test_that_is_named_exists() -> None:
    missing = sorted({test for test in named(TABLE) if not exists(test)})
    assert not missing
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        paths = set(re.findall(r"tests/(?!unit/)[\w/]+\.py(?:::\w+)*", text))  # unit: Model Foundry's own
        assert not sorted(path for path in paths if not exists(path)), page.name


def test_no_test_of_a_defect_is_forgotten() -> None:
    """Each file of tests/originals that tests defects is in the tables."""
    files = {path.name for path in Path(__file__).parent.glob("test_*_defects.py")}
    assert files == {Path(test.partition("::")[0]).name for test in named(TABLE) if "_defects.py" in test}


def test_a_missing_test_would_be_seen() -> None:
    assert exists("tests/originals/test_table.py::test_a_missing_test_would_be_seen")
    assert not exists("tests/originals/test_table.py::test_a_missing_test")
    assert not exists("tests/originals/test_tables.py")
    assert not exists("tests/compat/test_foundry.py::TestMambaOnCuda::test_mamba")
    assert exists("tests/compat/test_foundry.py::TestMambaOnCuda::test_mamba_forward_pass_cuda")
