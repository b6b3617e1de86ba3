"""Every file in examples/ runs, and what it prints is right: its claims are checked, not its layout alone."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.config.table import TABLE
from plait.ops.dispatch import table

FOLDER = Path(__file__).parent.parent / "examples"
# What each must print, besides never a "False".
WORDS: dict[str, list[str]] = {
    "configs": [
        "4 layers of mamba, d_state 8\n",
        # table, last norm, and four layers of norm, projections, convolution, scan and time steps (rank 4)
        f"{1000 * 64 + 64 + 4 * (64 + 64 * 256 + 128 * 5 + 128 * 20 + 128 * 9 + 128 * 5 + 128 * 64):,} parameters, "
        "learning rate 0.002\n",
        "a hybrid: mamba mamba attention mamba\n",
        "a wrong key: model.d_modle: unknown key;",
        "(did you mean 'd_model'?)\n",
        "the file gives the same config: True\n",
    ],
    "language_model": [
        "after 60 steps: 0.0",
        "greedy: 'four five six seven eigh'\n",
        "logits (1, 27, 260)\n",
    ],
    "classification": ["100 % right; pads change nothing: True\n", "outputs (16, 1)\n"],
    "features": [
        "features: (2, 15, 48)\n",
        "from the embedding's own vectors the same: True\n",
        "a masked row is the shorter row: True\n",
        "one vector a sequence: (2, 48)\n",
    ],
    "cache": [
        # three layers of 3 taps and 16 states a channel, one of 64 keys and values of 64 channels
        f"12 tokens read, {4 * (3 * (3 + 16) * 128 + 2 * 64 * 64):,} bytes; off the whole run by ",
        "  layer 2: {'conv': (1, 3, 128), 'ssm': (1, 128, 16)}\n",
        "the fork went its own way: True\n",
        "rewound, the same token gives the same logits: True\n",
        "generation without the cache gives the same tokens: True\n",
    ],
    "scan_timing": ["tokens  backend     ms  error\n"],
    "old_code": [
        "logits: (1, 10, 1001)\n",
        "generated: (1, 15)\n",
        f"11 tokens in 2 layers, {4 * 2 * (3 + 16) * 128 / 2**20:.3f} MB\n",
        "streamed: 4 tokens\n",
        "config read again: True\n",
    ],
    "custom_mixer": [
        "in a hybrid: ['mamba', 'running_mean', 'attention'] gradient: True\n",
        "generated: (2, 12)\nas mixer_cls: RunningMean\ngenerated: (2, 12)\n",
    ],
}


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(WORDS))
def test_it_runs_and_says_what_is_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(name, capsys)
    for words in WORDS[name]:
        assert words in out, out
    assert "False" not in out


def test_every_file_is_run_and_named() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == set(WORDS)
    listed = re.findall(r"^\| (\w+)\.py \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(names)


def test_the_cache_agrees_with_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    off = re.search(r"off the whole run by (\S+)", run("cache", capsys))
    assert off is not None and float(off[1]) < 1e-5


def test_the_scan_agrees_on_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^ +(\d+)  (\w+) +([\d.]+)  (\S+)$", run("scan_timing", capsys), re.MULTILINE)
    here = {row.backend for row in table() if row.op == "selective_scan" and row.available} - {"gpu"}
    assert {"portable", "reference"} <= here
    assert {(length, name) for length, name, _, _ in rows} == {
        (n, b) for n in ("8", "128", "1000") for b in here
    }
    assert all(float(error) < 1e-5 and float(ms) > 0 for _, _, ms, error in rows)
