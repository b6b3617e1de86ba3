"""Checkpoints are whole or refused by name; a disk that refuses leaves the earlier ones as they were."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import plait.training.checkpoint as checkpoint_module
from plait.config.errors import CheckpointError
from plait.formats.native import load_model
from plait.training import train
from plait.training.resume import find_checkpoint
from tests.training import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    runs.run(folder, steps=4, checkpoint_every=2)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


FILES = [
    "model.safetensors",
    "config.json",
    "config.yaml",
    "trainer.json",
    "tokenizer/plait_tokenizer.json",
    "train/rng-00000.safetensors",
    "train/optimizer/shard-00001-model-00001-of-00001.safetensors",
]


def test_what_a_checkpoint_holds(made: Path) -> None:
    folder = made / "run" / "checkpoints" / "step-00000004"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == sorted([*FILES, "manifest.json"])
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000002", "step-00000004"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def tamper(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, tamper, Path.unlink], ids=["truncated", "tampered", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_one_before_offered(
    copy: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / "checkpoints" / "step-00000004" / name)
    earlier = copy / "checkpoints" / "step-00000002"
    for resume in (copy, copy / "checkpoints" / "step-00000004"):
        with pytest.raises(CheckpointError) as error:
            train(runs.tiny(copy.parent), resume=resume, quiet=True)
        text = str(error.value)
        assert f"step-00000004/{name}" in text and f"plait train --resume {earlier}" in text, text
        assert "\n" not in text
    if name in ("model.safetensors", "config.json"):
        with pytest.raises(CheckpointError, match=name):
            load_model(copy)
    assert find_checkpoint(earlier, copy) == earlier


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("{", "damaged"), ('{"version": 9}', "version 9"), ("[]", "damaged")],
    ids=["missing", "half", "other version", "another thing"],
)
def test_a_bad_manifest_is_refused(copy: Path, content: str | None, words: str) -> None:
    path = copy / "checkpoints" / "step-00000004" / "manifest.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*{words}.*--resume .*step-00000002"):
        train(resume=copy, quiet=True)


def test_a_file_that_does_not_belong_is_refused(copy: Path) -> None:
    folder = copy / "checkpoints" / "step-00000004" / "train" / "optimizer"
    shutil.copy(next(folder.iterdir()), folder / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"shard-00002.* does not belong here"):
        train(resume=copy, quiet=True)


def test_when_no_checkpoint_is_whole_it_says_so(copy: Path) -> None:
    for step in ("step-00000002", "step-00000004"):
        truncate(copy / "checkpoints" / step / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000004/model\.safetensors.*no earlier checkpoint"):
        train(resume=copy, quiet=True)


FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*arguments: Any, **options: Any) -> None:
    raise FULL


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("write_model", FULL),
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("write_manifest", FULL),
        ("_sync", FULL),
        ("torch DCP", FULL),
    ],
    ids=["weights", "random numbers", "manifest", "sync", "optimizer"],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    real_put = checkpoint_module._put

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    def put(temporary: Path, folder: Path) -> None:
        real_put(temporary, folder)  # the first checkpoint is made, then the disk is full
        target = (
            "torch.distributed.checkpoint.filesystem.FileSystem.create_stream"
            if place == "torch DCP"
            else f"plait.training.checkpoint.{place}"
        )
        monkeypatch.setattr(target, fail)

    monkeypatch.setattr(checkpoint_module, "_put", put)
    with pytest.raises(CheckpointError) as caught:
        runs.run(tmp_path, steps=4, checkpoint_every=2)
    text = str(caught.value)
    assert "No space left on device" in text and "step-00000004" in text and "\n" not in text
    earlier = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert f"plait train --resume {earlier}" in text
    assert list(earlier.parent.iterdir()) == [earlier]
    monkeypatch.undo()
    assert train(resume=tmp_path / "run", quiet=True).step == 4


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    runs.run(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=3)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004", "step-00000005"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    result = runs.run(tmp_path, steps=1)
    with torch.no_grad():
        result.model.final_norm.weight[3] = float("inf")
    model, config = result.model, runs.tiny(tmp_path)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight has values that are not finite"):
        checkpoint_module.save_checkpoint(
            tmp_path / "other",
            model,
            config,
            result.tokenizer,
            checkpoint_module.Optimizer(model, config.training),
            checkpoint_module.RunState(step=1),
            checkpoint_module.World(0, 1, torch.device("cpu")),
            keep=1,
        )
    assert not list((tmp_path / "other" / "checkpoints").iterdir())


def test_nothing_in_a_checkpoint_is_pickled(made: Path) -> None:
    for path in (made / "run").rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json", ".jsonl", ".yaml", ".txt"), path
            assert b"\x80\x02" not in path.read_bytes()[:2]
    assert json.loads((made / "run" / "env.json").read_text())["starts"][0]["packages"]["torch"]
