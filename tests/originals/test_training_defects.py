"""Defects of the originals' trainers and loaders that must not come back: one test for each clause.

Numbers are those of the survey of the originals: 3.A-4 nanochat's optimizer groups, 3.B-12 Model Foundry's trainer,
3.D-7 BitByte's data, 3.D-8 BitByte's trainer.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import plait.training.checkpoint as checkpoint_module
import plait.training.trainer as trainer_module
from plait.config.errors import CheckpointError, TrainingError
from plait.config.load import load_config
from plait.config.optimizer import MuonConfig
from plait.config.table import kinds
from plait.config.timetable import CheckpointSchedule
from plait.data import open_data, read_documents
from plait.data.loader import Loader
from plait.data.packing import Packer, Rows
from plait.formats.native import load_model
from plait.models.model import Model
from plait.tokenizers.bytes import BytesTokenizer
from plait.training import train
from plait.training.muon import Muon
from plait.training.optimizers import Optimizer
from plait.training.schedules import lr_scale, progress_of
from plait.training.settings import torch_settings
from plait.training.setup import _training_texts
from plait.training.step import Update
from plait.training.timetable import Epochs, scheduled_steps
from tests.training import runs

# ---- 3.A-4: all parameters of the blocks went to Muon, which broke off at the first vector; groups by size


def test_a4_a_hybrid_makes_its_first_step_and_only_matrices_go_to_muon() -> None:
    config = load_config(
        "nanochat",
        [
            "--model.pattern=T M T M",
            "--model.d_model=32",
            "--model.attention.n_head=2",
            "--model.vocab_size=50",
        ],
    )
    model = Model(config.model)
    optimizer = Optimizer(model, config.training)
    by_muon = {
        name
        for name, parameter in model.named_parameters()
        for part in optimizer.parts
        if isinstance(part, Muon) and any(parameter is p for g in part.param_groups for p in g["params"])
    }
    left = {
        name.rsplit(".mixer.", 1)[-1]
        for name in optimizer.groups
        if name not in by_muon and ".mixer." in name
    }
    assert left == {"A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias"}
    assert all(model.get_parameter(name).dim() == 2 for name in by_muon)
    assert {name for name in optimizer.groups if ".mixer." not in name} - by_muon == {
        "embedding.tokens.weight",
        "head.unembedding.weight",
    }
    ids = torch.randint(50, (2, 12))
    with torch.no_grad():  # they begin at zero, and nothing before them would have a gradient
        for weight in (w for block in model.blocks for w in block.residual_weights()):
            weight.normal_(std=0.1)
        model.get_parameter("head.unembedding.weight").normal_(std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a4_matrices_of_one_size_but_other_shapes_are_told_apart() -> None:
    """(8, 2) and (4, 4) have sixteen values both: grouped by size they would be stacked as one shape."""
    shapes = [(8, 2), (4, 4), (2, 8), (8, 2)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    muon = Muon([{"params": parameters, "lr": 1.0}], MuonConfig(scale="shape", precision="fp32"))
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    for parameter, old, (n, m) in zip(parameters, before, shapes, strict=True):
        values = torch.linalg.svdvals(parameter.detach() - old)
        assert float(values.mean()) == pytest.approx(max(1.0, n / m) ** 0.5, rel=0.35)


# ---- 3.B-12: Model Foundry's trainer


def test_b12_a_resumed_run_trains_the_model_that_it_resumed(tmp_path: Path) -> None:
    """There the model was replaced after the optimizer was built: its weights never moved again."""
    first = runs.run(tmp_path, steps=2)
    saved = {n: p.clone() for n, p in load_model(first.run).named_parameters()}
    config = runs.tiny(tmp_path, steps=4)
    rest = train(config, resume=first.run, quiet=True)
    assert rest.step == 4
    assert all(not torch.equal(p, saved[name]) for name, p in rest.model.named_parameters())


@pytest.mark.parametrize("micro", [None, 64, 32])
def test_b12_steps_are_updates_however_many_forwards_they_take(
    tmp_path: Path, micro: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulation over k parts there took 1/k of the data and stretched the learning rate's schedule k times."""
    forwards: list[int] = []
    real = trainer_module.train_step

    def counted(*arguments: Any) -> Update:
        forwards.append(len(arguments[3]))
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "train_step", counted)
    schedule = {"schedule": "linear", "warmup": 2, "min_lr_ratio": 0.0, "batch_tokens": 128}
    result = runs.run(tmp_path, steps=6, micro_batch_tokens=micro, **schedule)
    assert set(forwards) == {1 if micro is None else 128 // micro}
    assert result.step == 6 and result.tokens == 6 * 128
    training = runs.tiny(tmp_path, **schedule).training
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    expected = [3e-3 * lr_scale(training, 6, step, progress_of(step, 6)) for step in range(6)]
    assert rates == pytest.approx(expected) and rates[-1] < 3e-3 / 3


def test_b12_what_is_saved_is_what_resume_reads(tmp_path: Path) -> None:
    """There weights were saved in one file under some names and looked for in another under others."""
    result = runs.run(tmp_path, steps=2)
    assert result.checkpoint is not None
    names = set(load_file(result.checkpoint / "model.safetensors"))
    assert names == {name for name, _ in result.model.named_parameters()}
    (result.checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        train(resume=result.run, quiet=True)


@pytest.mark.parametrize("kind", kinds())
def test_b12_every_kind_recomputes_its_activations(tmp_path: Path, kind: str) -> None:
    losses = []
    for name, recompute in (("plain", False), ("recomputed", True)):
        model = {
            "pattern": [kind, "attention"],
            "mamba3": {"headdim": 8, "d_state": 8},
            "mamba2": {"headdim": 8},
        }
        result = runs.run(tmp_path / name, steps=2, activation_checkpointing=recompute, model=model)
        losses.append(list(runs.losses(result.run).values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_b12_the_loss_scale_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflows lower it; a resumed run there began at the highest again."""
    real, calls = torch.nn.utils.get_total_norm, 0

    def norm(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor(float("inf")) if calls in (1, 2) else real(*arguments)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    result = runs.run(tmp_path, steps=3, precision="fp16", checkpoint_schedule=[2])
    assert result.checkpoint is not None
    overflown = json.loads((result.run / "checkpoints" / "step-00000002" / "trainer.json").read_text())
    assert overflown["scaler"]["scale"] == 2.0**14
    assert overflown["skipped"] == 0, "an overflow is the scale's fault, and no step that was not finite"
    scale = {"scale": 2.0**14, "good_steps": 1}
    assert json.loads((result.checkpoint / "trainer.json").read_text())["scaler"] == scale
    rest = train(runs.tiny(tmp_path, steps=4, precision="fp16"), resume=result.run, quiet=True)
    assert rest.checkpoint is not None
    assert json.loads((rest.checkpoint / "trainer.json").read_text())["scaler"] == {**scale, "good_steps": 2}


@pytest.mark.parametrize(("precision", "scaled"), [("bf16", False), ("fp16", True), ("fp32", False)])
def test_b12_every_precision_and_only_float16_scales(tmp_path: Path, precision: str, scaled: bool) -> None:
    result = runs.run(tmp_path, steps=2, precision=precision)
    assert result.checkpoint is not None
    state = json.loads((result.checkpoint / "trainer.json").read_text())["scaler"]
    assert (state["scale"] > 1) == scaled
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


def test_b12_logarithmic_checkpoints_are_logarithmic_in_every_epoch() -> None:
    """There steps, not offsets, were doubled, so all but the first lay beyond the epoch and even ones stood in."""
    schedule = CheckpointSchedule(later_epochs="log", min_per_epoch=5)
    found = scheduled_steps(schedule, 3000, Epochs(rows=1000, batch_rows=1))
    for start in (1000, 2000):
        inside = [step - start for step in found if start < step < start + 1000]
        assert inside == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert {2000, 3000} <= set(found)


def test_b12_running_out_of_memory_makes_no_half_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the part was skipped, and gradients of one step went on into the next."""
    real, calls = trainer_module.train_step, 0
    seen: dict[str, torch.Tensor] = {}

    def train_step(*arguments: Any) -> Update:
        nonlocal calls
        calls += 1
        if calls == 3:
            seen.update({n: p.detach().clone() for n, p in arguments[0].named_parameters()})
            batch = arguments[3][1]
            object.__setattr__(batch, "to", lambda *a, **b: (_ for _ in ()).throw(torch.OutOfMemoryError()))
            try:
                return real(*arguments)
            finally:
                assert all(torch.equal(p, seen[n]) for n, p in arguments[0].named_parameters())
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "train_step", train_step)
    with pytest.raises(TrainingError, match=r"out of memory.*--training.micro_batch_tokens=32"):
        runs.run(tmp_path, checkpoint_every=2)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    whole = runs.run(tmp_path / "whole")
    rest = train(runs.tiny(tmp_path), resume=tmp_path / "run", quiet=True)
    assert rest.checkpoint is not None and whole.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)


def test_b12_determinism_means_no_search_for_kernels(tmp_path: Path) -> None:
    with torch_settings(runs.tiny(tmp_path, deterministic=True).training):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


# ---- 3.D-7: BitByte's data


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """A corpus of bytes that are all different in pairs, as one stream."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "shard_00000.bin").write_bytes(b"".join(bytes([n // 250, n % 250]) for n in range(2000)))
    config = load_config(
        {"data": {"train": str(folder), "validation_fraction": 0, "cache": str(folder / ".cache")}}
    ).data
    return Rows(open_data(config, BytesTokenizer())[0], 16)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_d7_the_processes_part_the_data_exactly(rows: Rows, world: int) -> None:
    """Each row of an epoch goes to one process, whatever their number: none twice, none left out."""
    per_step = 6
    steps = rows.count // per_step
    loaders = [Loader(rows, per_step, Packer(16), rank=rank, world=world) for rank in range(world)]
    seen = Counter(
        tuple(row.tolist())
        for loader in loaders
        for _ in range(steps)
        for batch in loader.micro_batches()
        for row in batch.input_ids.reshape(-1, 16)
    )
    assert sum(seen.values()) == steps * per_step and max(seen.values()) == 1
    alone = Loader(rows, per_step, Packer(16))
    together = Counter(
        tuple(row.tolist())
        for _ in range(steps)
        for row in alone.micro_batches()[0].input_ids.reshape(-1, 16)
    )
    assert seen == together


def test_d7_every_place_of_a_shard_is_as_likely_as_any_other(rows: Rows) -> None:
    """An epoch reads each token once but for a rest shorter than a row; there, some places were favoured."""
    counts = np.zeros(rows.shards.n_tokens, dtype=int)
    epochs = 200
    for epoch in range(epochs):
        begin = rows.begin(epoch)
        left_out = np.arange(begin + rows.count * 16, begin + rows.shards.n_tokens) % rows.shards.n_tokens
        counts += 1
        counts[left_out] -= 1
    rest = rows.shards.n_tokens % 16
    assert counts.sum() == epochs * rows.count * 16
    assert counts.min() >= epochs - 12 * rest, "no place is left out again and again"
    begins = np.array([rows.begin(epoch) for epoch in range(2000)]) / rows.shards.n_tokens
    assert abs(begins.mean() - 0.5) < 0.03 and abs((begins < 0.25).mean() - 0.25) < 0.04


def test_d7_a_sample_reads_its_own_bytes_and_no_more(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """There each sample read its whole file anew, through a Python list."""
    read: list[int] = []
    real = type(rows.shards).read

    def counted(self: Any, start: int, stop: int) -> Any:
        found = real(self, start, stop)
        assert isinstance(found, np.ndarray)
        read.append(stop - start)
        return found

    monkeypatch.setattr(type(rows.shards), "read", counted)
    for index in range(50):
        rows.sample(index)
    assert sum(read) == 50 * 16


@pytest.mark.parametrize("split", ["documents", "last_file"])
def test_d7_nothing_that_is_evaluated_was_trained_on(tmp_path: Path, split: str) -> None:
    """Neither by the model nor by its tokenizer."""
    for number in range(4):
        text = b"".join(b"document %d of file %d\0" % (n, number) for n in range(40))
        (tmp_path / f"shard_{number:05d}.bin").write_bytes(text)
    options = {"format": "bytes", "separator": 0, "validation_split": split, "validation_fraction": 0.2}
    config = load_config({"data": {"train": str(tmp_path), "cache": str(tmp_path / ".c"), **options}}).data
    train_side, validation = open_data(config, BytesTokenizer())
    assert validation is not None

    def texts(shards: Any) -> set[bytes]:
        return {bytes(shards.document(n)[1:].tolist()) for n in range(shards.n_documents)}

    assert not texts(train_side) & texts(validation)
    assert len(texts(train_side)) + len(texts(validation)) == 160 and len(texts(validation)) > 10
    assert {bytes(text) for text in _training_texts(config)} == texts(train_side)  # type: ignore[arg-type]
    everything = {d.text for d in read_documents(str(tmp_path), "bytes", separator=0)}
    assert everything == texts(train_side) | texts(validation)


# ---- 3.D-8: BitByte's trainer


@pytest.mark.parametrize(("precision", "vocab_size"), [("fp32", None), ("bf16", 300), ("fp16", 261)])
def test_d8_neither_device_nor_precision_nor_vocabulary_is_fixed(
    tmp_path: Path, precision: str, vocab_size: int | None
) -> None:
    result = runs.run(tmp_path, steps=2, precision=precision, device="cpu", model={"vocab_size": vocab_size})
    assert result.step == 2 and result.model.vocab_size == (vocab_size or 260)


def test_d8_the_curriculum_reaches_every_batch_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the loader's workers went on with the length they were started with. And resume was not exact."""
    stages = [{"length": 4, "until": 0.25}, {"length": 16, "until": 0.75}]
    longest: list[int] = []
    real = trainer_module.train_step

    def watched(*arguments: Any) -> Update:
        batches = arguments[3]
        assert all(batch.cu_seqlens is not None for batch in batches)
        longest.append(max(int(batch.cu_seqlens.diff().max()) for batch in batches))
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "train_step", watched)
    options: dict[str, Any] = {"steps": 8, "sequence_length_schedule": stages, "checkpoint_schedule": [1, 5]}
    whole = runs.run(tmp_path, **options)
    assert longest[:2] == [4, 4] and max(longest[2:6]) == 16 and max(longest[6:]) == 32
    for step in (1, 5):
        out = str(tmp_path / f"from-{step}")
        checkpoint = whole.run / "checkpoints" / f"step-{step:08d}"
        rest = train(runs.tiny(tmp_path, **options, out=out), resume=checkpoint, quiet=True)
        assert rest.checkpoint is not None and whole.checkpoint is not None
        assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)


def test_d8_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = checkpoint_module._write_optimizer, 0

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        real(*arguments)
        if calls == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_write_optimizer", full)
    with pytest.raises(CheckpointError, match=r"No space left on device"):
        runs.run(tmp_path, steps=6, checkpoint_every=2)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert train(resume=tmp_path / "run", quiet=True).step == 6
