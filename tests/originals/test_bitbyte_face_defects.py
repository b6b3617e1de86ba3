"""Defects of BitByte's data and trainer that must not come back, numbered as in the survey of its defects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from plait.cli.entry import main as plait_command
from plait.compat.bitbyte.data import ByteShardDataset
from plait.compat.bitbyte.models import HybridLM
from plait.compat.bitbyte.training.trainer import Trainer
from plait.config.errors import CheckpointError
from plait.tokenizers import files

SMALL: dict[str, Any] = {"n_layer": 2, "d_model": 16, "d_ff": 24, "n_head": 2}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Files of very different sizes, all their bytes random."""
    folder = tmp_path / "bytes"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number, size in enumerate((5000, 40, 3000)):
        draw.integers(256, size=size, dtype=np.uint8).tofile(folder / f"shard_{number:05d}.bin")
    return folder


def trainer_of(model: HybridLM, **options: Any) -> Trainer:
    return Trainer(model, torch.optim.AdamW(model.parameters(), lr=3e-3), log_every=0, **options)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_d7_processes_part_the_data_without_overlap_or_bias(shards: Path, world: int) -> None:
    """There strides did not part the rows, a modulo preferred some offsets, and shards counted alike at any size."""
    stream = b"".join(p.read_bytes() for p in sorted(shards.glob("*.bin")))
    parts = [ByteShardDataset(shards, 50, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in parts} == {len(stream) // 50 // world}
    seen = np.zeros(len(stream), int)
    for part in parts:
        for i in range(len(part)):
            place = (stream + stream).index(bytes(part[i].tolist()))
            seen[np.arange(place, place + 50) % len(stream)] += 1
    assert seen.max() == 1  # nothing twice, on any process
    assert seen.sum() >= len(stream) - 50 * world  # and all but a rest


def test_d7_what_validates_was_never_trained_on(tmp_path: Path) -> None:
    """There both came from the same files."""
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"document number {number} " * 5)
    out = tmp_path / "packed"
    words = ["data", "pack", str(tmp_path), "--out", str(out), "--validation-fraction", "0.3"]
    assert plait_command(words) == 0
    sides = [
        set(next((out / side).glob("*.bin")).read_bytes().split(b"\0")) for side in ("train", "validation")
    ]
    assert len(sides[0] - {b""}) + len(sides[1] - {b""}) == 60 and sides[0] & sides[1] <= {b""}
    assert all(len(side) > 5 for side in sides)


def test_d8_neither_device_nor_precision_nor_vocabulary_is_wired_in() -> None:
    """There everything was CUDA, float16 and 256 ids."""
    torch.manual_seed(0)
    model = HybridLM(**SMALL, vocab_size=300)
    trainer = trainer_of(model, steps=2)
    assert trainer.world.device.type == "cpu" and trainer.config.precision == "fp32"
    before = model.tok_emb.weight.detach().clone()
    ids = torch.randint(256, 300, (2, 9))
    trainer.train([ids])
    moved = (model.tok_emb.weight != before).any(1)
    assert moved[ids.unique()].all()


def test_d8_a_save_that_fails_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it was overwritten in place."""
    model = HybridLM(**SMALL)
    trainer, path = trainer_of(model), tmp_path / "ckpt.pt"
    trainer.save(path)
    good = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    trainer.step = 7
    with pytest.raises(CheckpointError, match=r"ckpt.pt cannot be written: No space left on device"):
        trainer.save(path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("workers", [0, 2])
def test_d8_the_curriculum_reaches_what_workers_give_and_a_resumed_run(
    shards: Path, tmp_path: Path, workers: int
) -> None:
    """There workers kept the first length for ever, and a resumed run saw other data."""
    lengths: list[int] = []

    def run(resume: bool) -> HybridLM:
        torch.manual_seed(0)
        model = HybridLM(**SMALL)
        model.register_forward_pre_hook(lambda _m, inputs: lengths.append(inputs[0].shape[1]))
        loader = DataLoader(
            ByteShardDataset(shards, 40),
            batch_size=2,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        stages = ((0.5, 10),)
        trainer = trainer_of(
            model, steps=4, curriculum=stages, out=None if resume else tmp_path, save_every=2
        )
        if resume:
            trainer.resume(tmp_path / "ckpt_000002.pt")
        trainer.train(loader)
        return model

    whole = run(resume=False)
    assert lengths == [10, 10, 40, 40]
    lengths.clear()
    again = run(resume=True)
    assert lengths == [40, 40]
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
