"""Invariant 7: train 2N = train N, be killed, go on for N, bit for bit; and which checkpoint is gone on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plait.config.errors import CheckpointError, DataError, TrainingError
from plait.data.prepare import open_data
from plait.tokenizers.bytes import BytesTokenizer
from plait.training import rng, train
from plait.training.resume import find_checkpoint, resumed_config
from plait.training.setup import make_loader
from tests.training import runs

# Two runs of runs.tiny, each killed by SIGKILL in the middle of a step, long after its last checkpoint.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import plait.training.trainer as trainer
from tests.training import runs

torch.set_num_threads(1)
real, made = trainer.train_step, 0

def train_step(*arguments):
    global made
    made += 1
    if made == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

trainer.train_step = train_step
for optimizer in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        runs.run(Path(sys.argv[1]) / optimizer, optimizer=optimizer, checkpoint_every=4)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """With dropout and gradient accumulation, in the middle of an epoch and over the end of one."""
    optimizers, broken = ("adamw", "muon"), tmp_path / "broken"
    process = runs.spawn(KILLED, str(broken), *optimizers)
    whole = {name: runs.run(tmp_path / name, optimizer=name, checkpoint_every=4) for name in optimizers}
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for name, expected in whole.items():
        run = broken / name / "run"
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
        assert max(runs.losses(run)) == 6, "it went on after its checkpoint"
        state = json.loads((run / "checkpoints" / "step-00000004" / "trainer.json").read_text())
        rows = rows_of_an_epoch(broken / name)
        assert state["sample"] == 20 < rows < 40
        result = train(resume=run, quiet=True)
        assert result.step == expected.step == 8
        assert result.checkpoint is not None and expected.checkpoint is not None
        assert runs.tensor_hashes(result.checkpoint) == runs.tensor_hashes(expected.checkpoint)
        assert runs.losses(run) == runs.losses(tmp_path / name / "run")


def rows_of_an_epoch(folder: Path) -> int:
    """Rows of an epoch of the tiny run."""
    config = runs.tiny(folder)
    return open_data(config.data, BytesTokenizer())[0].n_tokens // config.data.sequence_length


def test_resume_is_not_equal_by_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part that a checkpoint keeps matters: without it the run goes on differently."""
    half = runs.run(tmp_path, steps=4)
    config = runs.tiny(tmp_path)
    assert half.checkpoint is not None

    def resumed(forget: str) -> dict[str, str]:
        with monkeypatch.context() as patch:
            if forget == "random numbers":
                patch.setattr("plait.training.setup.load_rng", lambda *arguments: None)
            elif forget == "optimizer":
                patch.setattr("plait.training.setup.load_optimizer", lambda *arguments: None)
            elif forget == "place in the data":
                real = make_loader
                patch.setattr("plait.training.setup.make_loader", lambda *a: real(*a[:-1], 0))
            out = str(tmp_path / forget.replace(" ", "-"))
            moved = config.replace(training=config.training.replace(out=out))
            result = train(moved, resume=half.checkpoint, quiet=True)
        assert result.checkpoint is not None
        return runs.tensor_hashes(result.checkpoint)

    true = resumed("nothing")
    weight = "model.safetensors: final_norm.weight"
    for forget in ("random numbers", "optimizer", "place in the data"):
        assert resumed(forget)[weight] != true[weight], forget


def test_auto_begins_and_goes_on(tmp_path: Path) -> None:
    config = runs.tiny(tmp_path, steps=2)
    assert train(config, resume="auto", quiet=True).step == 2
    again = config.replace(training=config.training.replace(steps=3))
    assert train(again, resume="auto", quiet=True).step == 3
    assert sorted(runs.losses(tmp_path / "run")) == [1, 2, 3]


def test_an_earlier_checkpoint_sets_the_later_aside(tmp_path: Path) -> None:
    runs.run(tmp_path, steps=4, checkpoint_every=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".step-00000003.abc.tmp").mkdir()
    result = train(resume=checkpoints / "step-00000002", quiet=True)
    assert result.step == 4
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "abandoned-step-00000004",
        "step-00000002",
        "step-00000004",
    ]
    assert sorted(runs.losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_moved_run_goes_on_where_it_lies(tmp_path: Path) -> None:
    runs.run(tmp_path, steps=2)
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    assert resumed_config(moved).run_folder == str(moved)
    assert resumed_config(moved, ["--training.steps=3"]).training.steps == 3
    result = train(resumed_config(moved, ["--training.steps=3"]), resume=moved, quiet=True)
    assert result.run == moved and result.step == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"d_model": 32}}, ["model.d_model", "16 there", "32 here"]),
        ({"model": {"pattern": "attention gru"}}, ["model.layers[1].kind", "'lstm'", "'gru'"]),
        ({"optimizer": "muon"}, ["another optimizer", "training.optimizer"]),
    ],
    ids=["width", "pattern", "optimizer"],
)
def test_another_model_or_optimizer_is_refused(
    tmp_path: Path, change: dict[str, object], words: list[str]
) -> None:
    runs.run(tmp_path, steps=2, checkpoint_every=1)
    config = runs.tiny(tmp_path, **change)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(CheckpointError) as error:
        train(config, resume=tmp_path / "run" / "checkpoints" / "step-00000001", quiet=True)
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_model_written_otherwise_is_the_same(tmp_path: Path) -> None:
    runs.run(tmp_path, steps=1)
    config = runs.tiny(tmp_path, model={"pattern": ["T", {"mixer": "lstm"}], "n_layer": 2}, steps=2)
    assert train(config, resume=tmp_path / "run", quiet=True).step == 2


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    runs.corpus(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "corpus", tmp_path)
    with pytest.raises(CheckpointError, match=r"no .*corpsu \(did you mean 'corpus'\?\)"):
        find_checkpoint(tmp_path / "corpsu", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no config\.yaml"):
        train(resume=tmp_path / "corpus", quiet=True)


def test_a_new_run_does_not_write_over_another(tmp_path: Path) -> None:
    config = runs.tiny(tmp_path, steps=1)
    train(config, quiet=True)
    with pytest.raises(TrainingError, match="already holds a run: go on with it"):
        train(config, quiet=True)
    (tmp_path / "elsewhere").mkdir()
    wrong = config.replace(data=config.data.replace(train=str(tmp_path / "elsewhere")))
    with pytest.raises(DataError, match="holds no file"):  # what cannot begin overwrites nothing
        train(wrong, quiet=True, overwrite=True)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert train(config, quiet=True, overwrite=True).step == 1
    branch = config.replace(training=config.training.replace(out=str(tmp_path / "branch")))
    branched = train(branch, resume=tmp_path / "run", quiet=True)
    assert branched.checkpoint == tmp_path / "branch" / "checkpoints" / "step-00000001"


def test_generators_are_captured_whole() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.normal()), float(torch.rand(()))]

    rng.seed_all(5)
    random.gauss(0, 1), np.random.normal()  # leaves a second Gaussian waiting in both
    states = rng.capture()
    first = draw()
    with rng.preserved():
        draw()
    rng.restore(states)
    assert draw() == first
