"""Where `plait` begins: fast help, the nearest right word, one line for every error."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from plait.cli import main
from plait.cli.table import COMMANDS, Entry
from plait.config.errors import DataError
from tests.cli.conftest import Run

HELP_OF_ALL = """
import contextlib, io, json, sys
from plait.cli import main
from plait.cli.table import COMMANDS
GROUPS = {"tokenizer": ["train"], "data": ["prepare", "pack"], "config": ["show", "validate", "schedule", "list"]}
lines = [["--help"], ["--version"], []]
for name in COMMANDS:
    lines += [[name, "--help"], *([name, inner, "--help"] for inner in GROUPS.get(name, []))]
helps = {}
for line in lines:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(line) == 0, line
    helps[" ".join(line)] = out.getvalue()
heavy = [name for name in ("torch", "numpy", "numba") if name in sys.modules]
import os
print(json.dumps([heavy, helps, os.environ["THP_MEM_ALLOC_ENABLE"]]))
"""


def test_help_of_every_command_without_torch() -> None:
    begin = time.perf_counter()
    command = [sys.executable, "-c", HELP_OF_ALL]
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    took = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    heavy, helps, large_pages = json.loads(done.stdout)
    assert heavy == []
    assert large_pages == "1"  # set before torch could be imported
    assert helps[""] == helps["--help"]
    for name, entry in COMMANDS.items():
        assert f"  {name} " in helps["--help"] and entry.line in helps["--help"]
        assert len(helps[f"{name} --help"]) > 100
    assert max(map(len, helps["--help"].splitlines())) <= 110
    assert (
        "--max-new-tokens" in helps["generate --help"] and "--vocab-size" in helps["tokenizer train --help"]
    )
    assert took < 15  # for all of them, on a busy machine; torch alone takes longer than one needs


def test_paragraphs_of_help_fill_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of a docstring are not those of the terminal; of a command in a group neither."""
    monkeypatch.setenv("COLUMNS", "80")
    for words, begin in (
        (["chat"], "clear begins"),
        (["estimate"], "A training step"),
        (["config", "schedule"], "Print"),
    ):
        assert main([*words, "--help"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        first = next(i for i, line in enumerate(lines) if line.startswith(begin))
        paragraph = lines[first : lines.index("", first)]
        assert len(paragraph) > 1 and all(len(line) > 60 for line in paragraph[:-1]), paragraph


def test_the_installed_script_and_the_module_are_the_same_command_line() -> None:
    script = Path(sys.executable).with_name("plait")
    for command in ([script], [sys.executable, "-m", "plait"]):
        done = subprocess.run([*command, "trian"], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: there is no command 'trian' (did you mean 'train'?)\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "plait", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "'train'"),
        (["doktor"], "'doctor'"),
        (["xyz"], "commands: demo, train, generate"),
        (["generate", "x", "y", "--temprature", "1"], "--temperature"),
        (["info", "tiny", "--lenght", "5"], "--length"),
        (["train", "tiny", "--dryrun"], "--dry-run"),
        (["tokenizer", "trane"], "train"),
        (["config", "shwo"], "show"),
    ],
)
def test_a_typo_gets_the_nearest_word(plait: Run, words: list[str], hint: str) -> None:
    ran = plait(*words)
    assert ran.status == 2 and ran.out == ""
    assert hint in ran.error


@pytest.mark.parametrize(
    "words", [["generate"], ["info", "tiny", "--length", "many"], ["generate", "a", "b", "c"]]
)
def test_a_command_line_that_makes_no_sense_says_where_help_is(plait: Run, words: list[str]) -> None:
    ran = plait(*words)
    assert ran.status == 2
    assert ran.error.endswith(f"see plait {words[0]} --help")


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException | int) -> None:
    app = typer.Typer(add_completion=False)

    @app.command()
    def boom() -> None:
        raise typer.Exit(error) if isinstance(error, int) else error

    monkeypatch.setitem(COMMANDS, "boom", Entry("tests.cli.test_entry:BOOM", ""))
    monkeypatch.setattr("plait.cli.entry.load_object", lambda target: app)


@pytest.mark.parametrize(
    ("make", "status", "said"),
    [
        (lambda: DataError("line one\nline  two"), 1, "error: line one line two\n"),
        (
            lambda: OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            1,
            "error: No space left on device: /a/b\n",
        ),
        (lambda: KeyboardInterrupt(), 130, ""),
        (lambda: typer.Abort(), 130, ""),
        (lambda: 7, 7, ""),
    ],
)
def test_what_goes_wrong_is_one_line(
    plait: Run,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], BaseException | int],
    status: int,
    said: str,
) -> None:
    _raising(monkeypatch, make())
    ran = plait("boom")
    assert (ran.status, ran.out, ran.err) == (status, "", said)


def test_ctrl_c_while_a_command_is_being_imported_is_quiet(
    plait: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plait.cli.entry.load_object", interrupted)
    assert plait("info", "tiny") == (130, "", "")


def test_out_of_memory_is_one_line_with_advice(plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    _raising(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    ran = plait("boom")
    assert ran.status == 1 and "micro_batch_tokens" in ran.error
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        _raising(monkeypatch, error)
    assert "out of memory" in plait("boom").error


def test_a_fault_of_our_own_keeps_its_traceback(plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for fault in (ValueError("a bug"), RuntimeError("a bug")):
        _raising(monkeypatch, fault)
        with pytest.raises(type(fault)):
            plait("boom")


def test_other_ranks_say_who_they_are(plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert plait("trian").err.startswith("[rank 3] error: ")


def test_help_and_version_words(plait: Run) -> None:
    import plait as package

    assert plait("help").out == plait("--help").out == plait("-h").out
    assert plait("help", "info").out == plait("info", "--help").out
    assert plait("--version").out == f"plait {package.__version__}\n"
