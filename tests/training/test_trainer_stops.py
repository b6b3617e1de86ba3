"""What stops a run before its end, and what is left then: signals, numbers that are not finite, memory, disk."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import plait.training.trainer as trainer_module
from plait.config.errors import BuildError, CapacityError, DataError, TrainingError
from plait.config.load import load_config
from plait.training import train
from plait.training.signals import stop_request
from plait.training.step import Update
from tests.training import runs


def sent_at(step: int, action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of a step."""
    real, made = trainer_module.train_step, 0

    def train_step(*arguments: Any) -> Update:
        nonlocal made
        made += 1
        if made == step:
            action()
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "train_step", train_step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_at_the_end_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = runs.run(tmp_path / "whole", steps=4)
    sent_at(2, lambda: os.kill(os.getpid(), number), monkeypatch)
    screen = io.StringIO()
    config = runs.tiny(tmp_path / "broken", steps=4)
    result = train(config, console=Console(file=screen, width=200))
    run = tmp_path / "broken" / "run"
    assert result.stopped == "signal" and result.step == 2
    assert result.checkpoint == run / "checkpoints" / "step-00000002"
    assert f"stopped by {number.name}: step 2" in screen.getvalue()
    assert f"plait train --resume {run}" in screen.getvalue()
    monkeypatch.undo()
    rest = train(resume=run, quiet=True)
    assert whole.checkpoint is not None and rest.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)


def test_a_second_interrupt_breaks_off() -> None:
    with pytest.raises(KeyboardInterrupt), stop_request() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    real = trainer_module.set_up
    models: list[torch.nn.Module] = []

    def set_up(*arguments: Any) -> Any:
        parts = real(*arguments)
        models.append(parts.model)
        return parts

    def spoil() -> None:
        with torch.no_grad():
            models[-1].get_parameter("final_norm.weight")[0] = float("nan")

    monkeypatch.setattr(trainer_module, "set_up", set_up)
    sent_at(4, spoil, monkeypatch)
    with pytest.raises(TrainingError) as error:
        runs.run(tmp_path, steps=8, checkpoint_every=2, precision=precision)
    text = str(error.value)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert "the loss is nan at step 4" in text and "\n" not in text
    assert f"plait train --resume {checkpoint} --training.lr=0.0015" in text
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert max(runs.losses(tmp_path / "run")) == 3, "nothing was written after it went bad"


def test_a_gradient_that_is_not_finite_leaves_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.utils.get_total_norm
    calls = 0

    def norm(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor(math.inf) if calls == 3 else real(*arguments)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    with pytest.raises(TrainingError, match=r"norm of the gradient is inf at step 3.*no checkpoint yet"):
        runs.run(tmp_path / "wide")
    calls = 0
    result = runs.run(tmp_path / "fp16", precision="fp16")
    records = [line for line in runs.metrics(result.run) if line["kind"] == "train"]
    assert [line["grad_norm"] is None for line in records] == [False, False, True, *[False] * 5]


def test_momentum_and_decay_follow_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By steps and by progress; a resumed run goes on with them."""
    seen: list[tuple[float, float, float]] = []
    real = trainer_module.train_step

    def watched(*arguments: Any) -> Update:
        adamw, muon = arguments[2].parts
        group = muon.param_groups[0]
        seen.append((group["momentum"], group["weight_decay"], adamw.param_groups[0]["weight_decay"]))
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "train_step", watched)
    options: dict[str, Any] = {
        "optimizer": "muon",
        "muon": {"momentum": 0.9, "momentum_start": 0.5, "momentum_warmup": 4, "momentum_end": 0.8},
        "decay_fraction": 0.25,
        "weight_decay": 0.2,
        "weight_decay_schedule": "linear",
        "groups": {"embedding.*": {"weight_decay": 0.05}},
        "checkpoint_schedule": [3],
    }
    whole = runs.run(tmp_path, **options)
    momenta = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.85]
    assert [m for m, _, _ in seen] == pytest.approx(momenta)
    assert [d for _, d, _ in seen] == pytest.approx([0.2 * (1 - step / 8) for step in range(8)])
    assert {d for _, _, d in seen} == {0.05}
    config = runs.tiny(tmp_path, **options, out=str(tmp_path / "again"))
    rest = train(config, resume=whole.run / "checkpoints" / "step-00000003", quiet=True)
    assert [m for m, _, _ in seen[8:]] == pytest.approx(momenta[3:])
    assert rest.checkpoint is not None and whole.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)


def norms(bad: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of the gradient is infinite at these steps."""
    real, calls = torch.nn.utils.get_total_norm, 0

    def norm(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor(math.inf) if calls in bad else real(*arguments)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)


def test_steps_that_are_not_finite_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many in a row; the weights stay, the data and the schedule go on, and a resumed run remembers."""
    norms({2, 4, 5}, monkeypatch)
    screen = io.StringIO()
    config = runs.tiny(tmp_path / "some", skip_nonfinite=2, checkpoint_schedule=[3, 4, 5])
    result = train(config, console=Console(file=screen, width=200))
    assert result.step == 8 and result.tokens == 8 * 160
    assert "step 4 was left out: the norm of the gradient is inf" in screen.getvalue()
    folder = result.run / "checkpoints"
    hashes = [runs.tensor_hashes(folder / f"step-0000000{step}") for step in (3, 4, 5, 8)]
    weights = [{n: h for n, h in found.items() if "rng" not in n} for found in hashes]
    assert weights[0] == weights[1] == weights[2] != weights[3], "neither weights nor optimizer moved"
    counts = [
        json.loads((folder / f"step-0000000{s}" / "trainer.json").read_text())["skipped"]
        for s in (3, 4, 5, 8)
    ]
    assert counts == [0, 1, 2, 0]
    logged = {line["step"]: line for line in runs.metrics(result.run) if line["kind"] == "train"}
    assert logged[4]["grad_norm"] is None and logged[6]["grad_norm"] > 0
    norms({1}, monkeypatch)
    with pytest.raises(TrainingError, match=r"norm of the gradient is inf at step 6"):
        train(
            config.replace(training=config.training.replace(out=str(tmp_path / "on"))),
            resume=folder / "step-00000005",
            quiet=True,
        )


def test_too_many_steps_in_a_row_that_are_not_finite_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms({2, 3, 4}, monkeypatch)
    with pytest.raises(TrainingError, match=r"norm of the gradient is inf at step 4"):
        runs.run(tmp_path, skip_nonfinite=2)


def test_a_loss_that_is_not_finite_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is bad, not the weights: float16's overflows are counted apart from it."""
    real, made = trainer_module.train_step, 0

    def train_step(*arguments: Any) -> Update:
        nonlocal made
        made += 1
        weight = arguments[0].get_parameter("final_norm.weight")
        kept = weight.detach().clone()
        if made == 3:
            with torch.no_grad():
                weight[0] = float("nan")
        update = real(*arguments)
        if made == 3:
            assert update.skipped and not update.overflowed and not math.isfinite(update.loss)
            with torch.no_grad():
                weight.copy_(kept)
        return update

    monkeypatch.setattr(trainer_module, "train_step", train_step)
    result = runs.run(tmp_path, skip_nonfinite=1, precision="fp16")
    assert result.step == 8 and result.loss is not None and math.isfinite(result.loss)
    assert sorted(runs.losses(result.run)) == [1, 2, 4, 5, 6, 7, 8]


def test_running_out_of_memory_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Update:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trainer_module, "train_step", full)
    with pytest.raises(TrainingError, match=r"out of memory with 64 tokens.*micro_batch_tokens=32"):
        runs.run(tmp_path)


def test_a_disk_full_in_the_middle_of_a_log_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    sent_at(2, lambda: monkeypatch.setattr(Path, "open", full), monkeypatch)
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        runs.run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": {"train": None}}, DataError, "no text is named"),
        ({"data": {"train": "/nowhere/at/all"}}, DataError, "no file or folder"),
        ({"batch_tokens": 16, "micro_batch_tokens": None}, TrainingError, "less than one row"),
        ({"model": {"vocab_size": 100}}, TrainingError, "leave model.vocab_size out"),
        ({"objective": "masked_lm"}, TrainingError, "--model.head.kind=masked_lm"),
        (
            {"sample_every": 5, "model": {"head": "masked_lm"}, "objective": "masked_lm"},
            BuildError,
            "cannot generate",
        ),
        (
            {"sample_every": 5, "model": {"embedding": {"position": "learned", "max_positions": 64}}},
            CapacityError,
            "at most 64 new tokens",
        ),
    ],
)
def test_what_cannot_begin_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    runs.corpus(tmp_path)
    with pytest.raises(error, match=words) as caught:
        train(load_config(runs.values(tmp_path, **changes)), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
