"""The README's commands and snippets run as printed, and the mixer it adds keeps every promise."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from plait.cli.entry import main
from plait.config.table import TABLE, kinds, mixer_class
from plait.ops.dispatch import table
from tests.invariants import (
    check_batch,
    check_causal,
    check_edges,
    check_fork,
    check_gradient_through_states,
    check_packed,
    check_packed_states,
    check_splits,
    check_steps,
    make_mixer,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TOLERANCE = 1e-12


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the commands read."""
    (tmp_path / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_commands_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    plaits = [command for command in commands if command.startswith("plait ")]
    assert len(plaits) >= 6
    for command in plaits:
        assert main(shlex.split(command)[1:]) == 0, f"{command}\n{capfd.readouterr()}"


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:.*\n(\t.+\n)+", makefile, re.MULTILINE)


def test_the_first_snippet_runs(here: Path) -> None:
    exec(compile(blocks("python")[0], "README.md", "exec"), {})


def test_the_added_mixer_keeps_every_promise(here: Path) -> None:
    """The file in the README, one line of registration, and no new test code."""
    names: dict[str, object] = {}
    try:
        exec(compile(blocks("python")[1], "README.md", "exec"), names)
        assert mixer_class("ema") is names["EMA"]
        mixer = make_mixer("ema", {"memory": 0.7})
        check_splits(mixer, TOLERANCE, in_place=False)
        check_splits(mixer, TOLERANCE, in_place=True)
        check_steps(mixer, TOLERANCE)
        check_packed(mixer, TOLERANCE)
        check_packed_states(mixer, TOLERANCE)
        check_gradient_through_states(mixer, TOLERANCE)
        check_causal(mixer)
        check_batch(mixer, TOLERANCE)
        check_fork(mixer)
        check_edges(mixer)
        model = names["model"]
        ids = torch.randint(260, (2, 9))
        assert model(ids, labels=ids).loss.isfinite()  # type: ignore[operator]
        greedy = model.generate(ids, max_new_tokens=5, temperature=0.0)  # type: ignore[attr-defined]
        assert torch.as_tensor(greedy).shape[0] == 2
    finally:
        TABLE.pop("ema", None)


# The op that decides on which backends a mixer runs.
OPS = {
    "attention": "attention",
    "mamba": "selective_scan",
    "mamba2": "ssd",
    "mamba3": "trapezoidal_ssd",
    "s4d": "diagonal_ssm",
}


def test_the_backends_of_each_mixer_are_those_of_its_op() -> None:
    lines = [line.split("|") for line in README.splitlines() if line.startswith("| `")]
    told = {names: cells[-2].strip() for cells in lines for names in re.findall(r"`(\w+)`", cells[1])}
    assert set(told) >= set(kinds())
    for mixer, op in OPS.items():
        there = [
            row.backend for row in table() if row.op == op and "this op has only" not in (row.reason or "")
        ]
        assert told[mixer] == ", ".join(name for name in there if name != "reference"), mixer
    assert all(told[kind] == "torch" for kind in ("rnn", "gru", "lstm"))


def test_the_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 6 and all((ROOT / link).is_file() for link in links)


def test_the_tree_names_every_folder() -> None:
    tree = README.split("## The tree")[1].split("## Adding")[0]
    folders = {p.name for p in (ROOT / "src" / "plait").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(re.findall(r"^      (\w+)/", tree, re.MULTILINE))
