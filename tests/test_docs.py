"""Every page of docs/ runs as printed: its Python and shell blocks in order, in one folder and one namespace.

Blocks of other languages (``text``) are for the eye. A shell block holds commands of ``plait`` and of
``python -m plait...`` alone, one a line; they run in this process.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.cli.entry import main
from plait.config.table import TABLE

FOLDER = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))
RUNS = ("python", "bash")


def blocks(text: str) -> list[tuple[str, str, int]]:
    """(language, code, line) of each fenced block."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append((match[1], match[2], text.count("\n", 0, match.start()) + 2))
    return found


def commands(code: str) -> list[list[str]]:
    """The words of each line; what follows a # is a remark."""
    lines = [line.strip() for line in code.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> int:
    """The exit status of ``plait ...`` or of ``python -m plait...``."""
    if words[0] == "plait":
        return main(words[1:])
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] == "plait":
        if words[2] == "plait":
            return main(words[3:])
        try:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0)
        return 0
    raise AssertionError(f"{words[0]} is not run by this test: mark the block ```text")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own; the table of mixers is afterwards as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("PLAIT_CACHE", "NANOCHAT_BASE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("WORLD_SIZE", "RANK", "PLAIT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    before = dict(TABLE)
    yield tmp_path
    TABLE.clear()
    TABLE.update(before)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_printed(
    page: str, here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a mixer of one's own recomputes
        for language, code, line in blocks((FOLDER / page).read_text(encoding="utf-8")):
            if language == "python":
                exec(compile("\n" * (line - 1) + code, page, "exec"), names)
            elif language == "bash":
                for words in commands(code):
                    monkeypatch.setattr(sys, "argv", [words[0], *words[3:]])
                    status = run_command(words)
                    assert status == 0, f"{page}: {' '.join(words)}\n{capfd.readouterr().err[-2000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_left_out_by_mistake(page: str) -> None:
    text = (FOLDER / page).read_text(encoding="utf-8")
    found = blocks(text)
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(found), "a fence is not closed"
    assert {language for language, _, _ in found} <= {*RUNS, "text", "yaml", "json"}


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_named_exist(page: str) -> None:
    """Also in prose and in blocks that are not run."""
    for name in sorted(set(re.findall(r"\bplait(?:\.[a-z_0-9]+)+\b", (FOLDER / page).read_text()))):
        parts = name.split(".")
        while len(parts) > 1 and not _is_module(".".join(parts)):
            parts.pop()
        rest = name.split(".")[len(parts) :]
        found: object = importlib.import_module(".".join(parts))
        for attribute in rest:
            found = getattr(found, attribute)  # AttributeError names what is not there


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (FOLDER / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = FOLDER / (file or page)
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
            }, target
