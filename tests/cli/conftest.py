"""Runs commands in this process, as `plait` would, and one tiny trained run for all tests."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from plait.cli import main

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
TINY = (
    "--model.d_model=16",
    "--model.pattern=M2 T",
    "--model.mamba2.d_state=8",
    "--model.mamba2.headdim=8",
    "--model.attention.n_head=2",
    "--model.mlp=none",
    "--data.sequence_length=32",
    "--data.validation_fraction=0.2",
    "--training.batch_tokens=64",
    "--training.log_every=1",
    "--training.device=cpu",
)


class Ran(NamedTuple):
    """What a command line came to."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one line of error; fails if there is another kind of failure."""
        lines = self.err.strip().splitlines()
        assert lines and lines[-1].startswith("error: "), self
        assert sum(line.startswith("error: ") for line in lines) == 1, self
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("error: ")


Run = Callable[..., Ran]


def run_plait(*words: object, stdin: str = "") -> Ran:
    """Run `plait WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sys.stdin", io.StringIO(stdin))
        status = main([str(word) for word in words])
    return Ran(status, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # what main() sets must not outlive a test


@pytest.fixture
def plait() -> Run:
    return run_plait


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text(TEXT)
    run = folder / "run"
    more = ("--training.steps=2", "--training.checkpoint_every=1", f"--training.out={run}")
    ran = run_plait("train", *TINY, *more, f"--data.train={text}", f"--data.cache={folder / 'cache'}")
    assert ran.status == 0, ran
    yield run


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of that run, to do with as a test likes."""
    shutil.copytree(trained_once, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
