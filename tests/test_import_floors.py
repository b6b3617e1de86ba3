"""The tree of the house: who may import whom, how long a file may be, and what stays free of torch."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "plait"
PACKAGE = "plait"
FLOORS = {
    "config": 0,
    "ops": 1,
    "tokenizers": 1,
    "data": 2,
    "nn": 2,
    "mixers": 3,
    "models": 4,
    "formats": 5,
    "quantization": 5,
    "inference": 6,
    "evaluation": 7,
    "training": 8,
    "api": 9,
    "bench": 9,
    "compat": 9,
    "serving": 9,
    "cli": 10,
}
TOP = 11  # plait/__init__.py, plait/__main__.py
MOST_LINES, MOST_LINES_TRITON, MEDIAN_LINES = 500, 800, 180


def module_files(root: Path) -> dict[str, Path]:
    """Dotted name to file, for every module under the package's folder."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports(name: str, path: Path, modules: Iterable[str]) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether it runs) of each import of ours in a file; functions are looked into."""
    known = set(modules)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        runs = id(node) not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, runs
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in known else base), node.lineno, runs


def floor(name: str) -> int | None:
    """The floor of a module of ours; None if its package has none."""
    parts = name.split(".")
    if len(parts) == 1 or name == f"{PACKAGE}.__main__":
        return TOP
    return FLOORS.get(parts[1])


def violations(root: Path) -> list[str]:
    """Every import that goes up, every circle of files or packages, every package without a floor."""
    modules = module_files(root)
    found = []
    files: dict[str, set[str]] = {name: set() for name in modules}
    packages: dict[str, set[str]] = {}
    for name, path in modules.items():
        own = floor(name)
        if own is None:
            found.append(f"{name}: its package has no floor")
            continue
        for target, line, runs in imports(name, path, modules):
            if target.split(".")[0] != PACKAGE:
                if own == 0 and target.split(".")[0] == "torch":
                    found.append(f"{name}:{line} imports {target} on the floor without torch")
                continue
            if path.name == "reference.py":
                found.append(f"{name}:{line} imports {target}; a reference shares no code")
            above = floor(target)
            if above is None or above > own:
                found.append(f"{name}:{line} (floor {own}) imports {target} (floor {above})")
            if runs and target in files and target != name:
                files[name].add(target)
            if own != TOP and above not in (None, TOP) and target.split(".")[1] != name.split(".")[1]:
                packages.setdefault(name.split(".")[1], set()).add(target.split(".")[1])
    for graph in (files, packages):
        circle = find_circle(graph)
        if circle:
            found.append("circle: " + " -> ".join(circle))
    return found


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph, its first node repeated at the end; [] if there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            circle = visit(other, [*trail, node])
            if circle:
                return circle
        done.add(node)
        return []

    for start in sorted(graph):
        circle = visit(start, [])
        if circle:
            return circle
    return []


def test_imports_go_down_and_never_in_circles() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"nn/a.py": "from plait.mixers.b import B", "mixers/b.py": ""}, "(floor 2) imports plait.mixers.b"),
        ({"nn/a.py": "def f():\n    import plait.models", "models/__init__.py": ""}, "imports plait.models"),
        ({"nn/__init__.py": "from ..models import x", "models/__init__.py": ""}, "imports plait.models"),
        ({"nn/a.py": "from plait import build", "__init__.py": ""}, "(floor 11)"),
        (
            {"nn/a.py": "from plait.nn import b", "nn/b.py": "from . import a"},
            "plait.nn.a -> plait.nn.b -> plait.nn.a",
        ),
        (
            {"nn/a.py": "import plait.data.b", "data/b.py": "", "data/c.py": "import plait.nn.d"},
            "data -> nn -> data",
        ),
        ({"extra/a.py": ""}, "plait.extra.a: its package has no floor"),
        ({"config/a.py": "def f():\n    from torch import nn"}, "imports torch"),
        ({"ops/x/reference.py": "from plait.ops import dispatch", "ops/dispatch.py": ""}, "shares no code"),
        (
            {"nn/a.py": "if TYPE_CHECKING:\n    from plait.models import M", "models/__init__.py": ""},
            "imports plait.models",
        ),
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, text in files.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert any(complaint in found for found in violations(tmp_path / PACKAGE))


def test_right_imports_pass(tmp_path: Path) -> None:
    (tmp_path / PACKAGE / "nn").mkdir(parents=True)
    (tmp_path / PACKAGE / "nn" / "a.py").write_text(
        "from typing import TYPE_CHECKING\nimport torch\nfrom plait.nn.b import B\n"
    )
    (tmp_path / PACKAGE / "nn" / "b.py").write_text("if TYPE_CHECKING:\n    from plait.nn.a import A\n")
    assert violations(tmp_path / PACKAGE) == []


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in module_files(ROOT).values()}
    most = {p: MOST_LINES_TRITON if p.name.startswith("gpu") else MOST_LINES for p in lines}
    assert {str(path): n for path, n in lines.items() if n > most[path]} == {}
    assert statistics.median(lines.values()) <= MEDIAN_LINES


@pytest.mark.parametrize(
    "code",
    [
        "import plait; plait.load_config; plait.register_mixer; dir(plait)",
        "import plait.config, plait.config.schema, plait.config.load, plait.config.recipes",
        "import sys; sys.argv = ['plait', '--help']\n"
        "from plait.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code, end.code",
    ],
    ids=["plait", "config", "plait --help"],
)
def test_no_torch_is_imported(code: str) -> None:
    code += "\nimport sys\nheavy = {'torch', 'numba', 'transformers', 'matplotlib'} & set(sys.modules)"
    code += "\nassert not heavy, heavy"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
