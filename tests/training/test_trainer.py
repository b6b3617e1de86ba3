"""A run from a config to its folder: what it writes, when it stops, and how it fails."""

from __future__ import annotations

import io
import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import plait.training.trainer as trainer_module
from plait.config.load import load_config
from plait.data.batch import Batch
from plait.formats.native import load_model, load_saved_tokenizer
from plait.training import train
from plait.training.settings import torch_settings
from tests.training import runs

HERE = trainer_module.World(0, 1, torch.device("cpu"))


def test_a_run_folder_holds_all_of_it(tmp_path: Path) -> None:
    result = runs.run(
        tmp_path,
        steps=6,
        eval_every=2,
        sample_every=3,
        sample_prompts=["the ", ""],
        sample_tokens=5,
        log_every=2,
    )
    run = tmp_path / "run"
    assert result.run == run and result.stopped == "steps" and result.step == 6
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "samples",
    ]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "step-00000003.txt",
        "step-00000006.txt",
    ]
    assert (run / "samples" / "step-00000006.txt").read_text().startswith("the ")
    assert [(x["kind"], x["step"]) for x in runs.metrics(run)] == [
        ("train", 1),
        ("train", 2),
        ("evaluation", 2),
        ("train", 4),
        ("evaluation", 4),
        ("train", 6),
        ("evaluation", 6),
    ]
    last, held_out = runs.metrics(run)[-2:]
    assert last["tokens"] == result.tokens == 6 * 160 and last["loss"] == result.loss
    assert result.validation is not None and held_out["bits_per_byte"] == result.validation.bits_per_byte
    # Bytes have one byte each, but the document's first is not predicted from nothing: it follows its bos.
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2), rel=0.05)
    environment = json.loads((run / "env.json").read_text())["starts"]
    assert len(environment) == 1 and environment[0]["processes"] == 1


def test_the_saved_config_runs_the_same_run_again(tmp_path: Path) -> None:
    first = runs.run(tmp_path, steps=3)
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.model.vocab_size == 260
    again = train(config.replace(training=config.training.replace(out=str(tmp_path / "again"))), quiet=True)
    assert again.loss == first.loss
    assert again.checkpoint is not None and first.checkpoint is not None
    assert runs.tensor_hashes(again.checkpoint) == runs.tensor_hashes(first.checkpoint)


def test_the_model_that_comes_back_is_the_one_that_is_saved(tmp_path: Path) -> None:
    result = runs.run(tmp_path, steps=2)
    loaded = load_model(tmp_path / "run")
    assert all(map(torch.equal, loaded.parameters(), result.model.parameters()))
    tokenizer = load_saved_tokenizer(tmp_path / "run")
    assert tokenizer is not None and tokenizer.fingerprint() == result.tokenizer.fingerprint()


def test_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    runs.run(tmp_path, steps=1, deterministic=True, seed=7)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index, union-attr]
    assert torch.get_num_threads() == 1 and not torch.are_deterministic_algorithms_enabled()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with torch_settings(runs.tiny(tmp_path, threads=2, deterministic=True, tf32=True).training):
        assert torch.get_num_threads() == 2 and torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == 1 and not torch.are_deterministic_algorithms_enabled()


def test_accumulation_does_not_change_the_numbers(tmp_path: Path) -> None:
    model = {"dropout": 0.0}
    whole = runs.run(tmp_path / "whole", micro_batch_tokens=None, model=model)
    parts = runs.run(tmp_path / "parts", micro_batch_tokens=32, model=model)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    first, second = (runs.losses(r.run) for r in (whole, parts))
    assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-5)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"deterministic": True}])
def test_what_must_not_change_the_numbers_does_not(tmp_path: Path, options: dict[str, Any]) -> None:
    """With dropout: the recomputed forward draws the same."""
    plain, other = runs.run(tmp_path / "plain"), runs.run(tmp_path / "other", **options)
    assert list(runs.losses(plain.run).values()) == pytest.approx(
        list(runs.losses(other.run).values()), rel=1e-6
    )


def test_the_loss_scale_is_resumed(tmp_path: Path) -> None:
    result = runs.run(tmp_path, steps=3, precision="fp16")
    config = runs.tiny(tmp_path, precision="fp16")
    assert result.checkpoint is not None
    parts = trainer_module.set_up(config, tmp_path, result.checkpoint, HERE)
    assert parts.scaler.state() == {"scale": 2.0**16, "good_steps": 3}


def test_looking_does_not_disturb(tmp_path: Path) -> None:
    """Evaluations, samples and checkpoints draw no random number of the run's, with dropout."""
    plain = runs.run(tmp_path / "plain")
    watched = runs.run(
        tmp_path / "watched", eval_every=2, sample_every=3, sample_tokens=8, checkpoint_every=2
    )
    assert runs.losses(plain.run) == runs.losses(watched.run)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_is_clipped_as_a_whole(tmp_path: Path, precision: str) -> None:
    """In float16 after the scale of the loss is taken out again."""
    config = runs.tiny(tmp_path, grad_clip=0.05, model={"dropout": 0.0}, precision=precision)
    parts = trainer_module.set_up(config, tmp_path, None, HERE)
    batches = parts.batches(HERE)
    n_targets = sum(batch.n_targets for batch in batches)
    parts.optimizer.set_lr(0.0)
    arguments = parts.forward, parts.objective, parts.optimizer, batches, n_targets
    update = trainer_module.train_step(*arguments, parts.config.training, parts.scaler, HERE)
    clipped = [gradient.clone() for gradient in parts.optimizer.gradients()]
    free = parts.config.training.replace(grad_clip=None)
    again = trainer_module.train_step(*arguments, free, parts.scaler, HERE)
    whole = parts.optimizer.gradients()
    assert again.grad_norm == pytest.approx(update.grad_norm) and update.grad_norm > 0.1
    assert float(torch.cat([g.flatten() for g in whole]).norm()) == pytest.approx(update.grad_norm, rel=1e-5)
    for small, large in zip(clipped, whole, strict=True):
        torch.testing.assert_close(small, large * (0.05 / update.grad_norm))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_products_train_as_well(tmp_path: Path, precision: str) -> None:
    wide, narrow = (
        runs.run(tmp_path / name, precision=name, model={"dropout": 0.0}) for name in ("fp32", precision)
    )
    assert all(parameter.dtype == torch.float32 for parameter in narrow.model.parameters())
    first, second = runs.losses(wide.run), runs.losses(narrow.run)
    assert first != second
    assert list(second.values()) == pytest.approx(list(first.values()), rel=0.02)


def test_it_learns(tmp_path: Path) -> None:
    corpus = runs.corpus(tmp_path)
    for path in corpus.iterdir():
        path.write_text("abcdefgh" * 20)
    result = train(
        load_config(runs.values(tmp_path, steps=40, lr=2e-2, eval_every=20, model={"dropout": 0.0})),
        quiet=True,
    )
    assert result.validation is not None and result.validation.bits_per_byte is not None
    assert result.validation.bits_per_byte < 1.0 < 6.0 < runs.metrics(result.run)[0]["bits_per_byte"]


def test_steps_follow_epochs_and_time(tmp_path: Path) -> None:
    result = runs.run(tmp_path / "epochs", epochs=0.5, steps=10_000)
    assert result.stopped == "steps" and result.step < 10
    result = runs.run(tmp_path / "time", minutes=1e-3, steps=10_000_000)
    assert result.stopped == "time" and 0 < result.step < 10_000
    last = [line for line in runs.metrics(result.run) if line["kind"] == "train"][-1]
    assert last["lr"] < 3e-3, "the schedule followed the time"
    assert result.checkpoint is not None


def test_a_tokenizer_is_trained_on_the_data_and_kept(tmp_path: Path) -> None:
    corpus = runs.corpus(tmp_path)
    config = load_config({**runs.values(tmp_path, steps=2), "tokenizer": {"type": "bpe", "vocab_size": 280}})
    result = train(config, quiet=True)
    assert result.tokenizer.type == "bpe" and result.model.vocab_size == result.tokenizer.vocab_size
    for path in corpus.iterdir():  # a resumed run reads the tokenizer, it does not train another
        path.write_text(path.read_text().upper())
    rest = train(config.replace(training=config.training.replace(steps=3)), resume=result.run, quiet=True)
    assert rest.tokenizer.fingerprint() == result.tokenizer.fingerprint()


def test_what_is_shown(tmp_path: Path) -> None:
    screen = io.StringIO()
    train(
        runs.tiny(tmp_path, steps=4, eval_every=2, log_every=2, sample_every=4, sample_tokens=3),
        console=Console(file=screen, width=300),
    )
    text = screen.getvalue()
    for words in (
        "parameters on cpu",
        "optimizer: matrix",
        "step 2/4  50 %",
        "bits/byte",
        "held out: loss",
        "sample:",
    ):
        assert words in text, text
    assert "all steps done" in text
    screen = io.StringIO()
    config = runs.tiny(tmp_path, steps=5, lr=1e-3)
    train(config, resume="auto", console=Console(file=screen, width=300, force_terminal=True))
    text = screen.getvalue()
    assert "resumed at step 4" in text and "changed: training.lr was 0.003, is now 0.001" in text
    assert train(config, resume="auto", quiet=True).step == 5


def test_the_usual_folder_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that names no folder lies in runs/<experiment_name>; resumed from there, nothing else is meant."""
    monkeypatch.chdir(tmp_path)
    config = runs.tiny(tmp_path, steps=1, out=None)
    run = train(config, quiet=True).run
    assert run == Path("runs") / config.experiment_name
    screen = io.StringIO()
    train(resume=str(run), console=Console(file=screen, width=300))
    assert "resumed at step 1" in screen.getvalue() and "changed: " not in screen.getvalue()


def test_batches_say_how_many_targets_they_have(tmp_path: Path) -> None:
    """What data counts and what the model's loss is over are the same."""
    result = runs.run(tmp_path, steps=1)
    for separate in ("separate", "joined"):
        config = runs.tiny(tmp_path, data={"documents": separate})
        parts = trainer_module.set_up(config, tmp_path, None, trainer_module.World(0, 1, torch.device("cpu")))
        batch: Batch
        for batch in (
            *parts.loader.micro_batches(2),
            *parts.evaluation(trainer_module.World(0, 1, result.model.device)),
        ):
            assert int(parts.model(**batch.inputs()).n_targets) == batch.n_targets
            assert int((parts.objective.targets(batch) >= 0).sum()) == batch.n_targets
