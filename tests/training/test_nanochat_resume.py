"""A run of nanochat's goes on in Plait: converted with its optimizers' state, resumed at its step of its schedule.

nanochat's side takes the same rows, by its own formulas of rates, momentum and decay.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import plait
from plait.config.errors import CheckpointError
from plait.config.schema import Config, TokenizerConfig
from plait.formats.convert import convert
from plait.formats.folders import list_checkpoints
from plait.formats.nanochat import from_state_dict, read, write
from plait.formats.nanochat_files import optimizer_files
from plait.formats.nanochat_optimizer import read_optimizer
from plait.tokenizers.load import train_tokenizer
from plait.training import train
from plait.training.adopt import optimizer_of
from plait.training.checkpoint import read_state
from plait.training.distributed import World
from plait.training.resume import find_checkpoint, resumed_config
from plait.training.setup import set_up
from tests.cli.conftest import run_plait
from tests.formats.nanochat_optimizers import set_gradients
from tests.formats.nanochat_sides import Theirs, far, files_of, meta_of, tensors_of, trained

BEGUN, LAST = 13, 15
SENTENCE = "the quick brown fox jumps over a lazy dog and sleeps under old trees. "
USER = {  # what nanochat notes of the settings: warm-up in steps (July) or as a share (October)
    "october": {"warmup_ratio": 0.0, "warmdown_ratio": 0.4, "final_lr_frac": 0.1, "grad_clip": 0.5},
    "july": {"warmup_steps": 4, "warmdown_ratio": 0.4, "final_lr_frac": 0.1},
}
both = pytest.mark.parametrize("name", USER)
ALONE = World(0, 1, torch.device("cpu"))


def schedule(theirs: Theirs, step: int) -> None:
    """Before update ``step`` of LAST: nanochat's rates (0.4 of 15 steps go down, to a tenth), momentum and decay."""
    july = theirs.name == "july"
    factor = min(1.0, (LAST - step) / 6)
    factor = factor + (1 - factor) * 0.1
    rising = (step / 400 * 0.97 + (1 - step / 400) * 0.85) if july else 0.85 + 0.1 * step / 300
    for optimizer in theirs.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if "momentum" in group:
                group["momentum"] = rising
                if july:
                    group["weight_decay"] = 0.28 * 0.5 * (1 + math.cos(math.pi * step / LAST))


def saved(name: str, folder: Path, **meta: Any) -> Theirs:
    """nanochat's files after step 13 of 15, 2 rows a step."""
    theirs = trained(name)
    for optimizer in theirs.optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] *= 0.7  # not the recipe's, as with another batch in July
    schedule(theirs, BEGUN - 1)  # as its last step left them in the file
    user = {"num_iterations": LAST, "device_batch_size": 1, **USER[name]}
    sizes = {"max_seq_len": 32, "total_batch_size": 64, "loop_state": {"total_training_time": 5.0}}
    theirs.save(folder, files_of(theirs, "one"), **{**sizes, "user_config": user, **meta})
    return theirs


def tokenizer() -> Any:
    return train_tokenizer(TokenizerConfig(type="characters"), [SENTENCE])


def settings(folder: Path, **more: str) -> Config:
    text = folder / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text(SENTENCE[number:] * 40)
    given = {
        "data.train": str(text),
        "data.format": "text",
        "data.cache": str(folder / "cache"),
        "training.sample_every": "0",
        "training.muon.precision": "fp32",
        "training.device": "cpu",
        **more,
    }
    return resumed_config(folder / "run", [f"--{key}={value}" for key, value in given.items()])


def follow(theirs: Theirs, config: Config, folder: Path, clip: float | None) -> None:
    """nanochat's steps to the end on the rows that the resumed run gets."""
    parts = set_up(config, folder, find_checkpoint(folder, folder), ALONE)
    engine = from_state_dict(tensors_of(theirs.name), meta_of(theirs.name)).train()
    for step in range(BEGUN, LAST):
        assert parts.loader.index == 2 * step
        some = parts.batches(ALONE)
        assert [tuple(batch.input_ids.shape) for batch in some] == [(1, 32)] * 2

        def loss(some: Any = some) -> Tensor:
            n_targets = sum(batch.n_targets for batch in some)
            return sum(parts.objective.run(engine, batch).loss_sum for batch in some) / n_targets

        set_gradients(engine, theirs.weights, loss)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.weights.values(), clip)
        schedule(theirs, step)
        for optimizer in theirs.optimizers:
            optimizer.step()


@both
def test_a_resumed_run_takes_nanochats_further_steps(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "base_checkpoints" / "d4")
    convert(tmp_path / "base_checkpoints", tmp_path / "run", "nanochat", tokenizer=tokenizer())
    state = read_state(list_checkpoints(tmp_path / "run")[0])
    assert (state.step, state.sample, state.tokens, state.elapsed) == (13, 26, 832, 5.0)
    loaded = plait.load(tmp_path / "run")  # a model like any other
    assert torch.equal(loaded.embedding.tokens.weight, theirs.weights["transformer.wte.weight"])
    config = settings(tmp_path)
    follow(theirs, config, tmp_path / "run", 0.5 if name == "october" else None)
    result = train(config, resume=tmp_path / "run", quiet=True)
    assert result.step == LAST and result.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000015"
    assert far(result.model, theirs) == {}


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("october", "training.grad_clip=null"),
        ("october", "training.muon.momentum_start=0.9"),
        ("july", "training.decay_fraction=0.5"),
        ("july", "training.weight_decay=0.0"),
    ],
)
def test_what_the_files_say_of_the_run_matters(name: str, setting: str, tmp_path: Path) -> None:
    """The comparison above would see another schedule, clipping, momentum or decay."""
    theirs = saved(name, tmp_path / "base_checkpoints" / "d4")
    convert(tmp_path / "base_checkpoints", tmp_path / "run", "nanochat", tokenizer=tokenizer())
    config = settings(tmp_path, **dict([setting.split("=")]))
    follow(theirs, config, tmp_path / "run", 0.5 if name == "october" else None)
    assert far(train(config, resume=tmp_path / "run", quiet=True).model, theirs)


def test_what_is_not_said_is_the_recipes(tmp_path: Path) -> None:
    """A folder that tells its step alone: nanochat's own defaults, and 20 tokens a parameter as its length."""
    saved("october", tmp_path / "d4", user_config={}, max_seq_len=64, total_batch_size=524288)
    convert(tmp_path / "d4", tmp_path / "run", "nanochat", tokenizer=tokenizer())
    config = resumed_config(tmp_path / "run")
    assert config.training.steps == 20 * 51264 // 524288 and config.data.sequence_length == 64
    assert (config.training.decay_fraction, config.training.grad_clip) == (0.2, 1.0)
    assert config.training.batch_tokens == 524288 and not config.data.shuffle
    assert config.run_folder == str(tmp_path / "run")


def test_by_the_command_and_without_the_state(tmp_path: Path) -> None:
    saved("october", tmp_path / "base_checkpoints" / "d4")
    tokenizer().save(tmp_path / "characters")
    words = ["convert", tmp_path / "base_checkpoints", tmp_path / "run", "--from=nanochat"]
    refused = run_plait(*words)
    assert refused.status and "no tokenizer" in refused.error and "--weights-only" in refused.error
    assert not (tmp_path / "run").exists()
    shown = run_plait(*words, f"--tokenizer={tmp_path / 'characters'}")
    assert shown.status == 0, shown.err
    flat = " ".join(shown.out.split())
    assert "after step 13, with the optimizers' state" in flat and "from row 26 of the text" in flat
    assert "the place in nanochat's files is not kept" in flat and "plait train --resume" in flat
    words[2] = tmp_path / "model"
    shown = run_plait(*words, "--weights-only")
    assert shown.status == 0 and "optimizers" not in shown.out
    assert (tmp_path / "model" / "model.safetensors").is_file() and not list_checkpoints(tmp_path / "model")


def test_a_state_that_is_not_whole_leaves_the_model_to_be_converted(tmp_path: Path) -> None:
    """October's distributed runs: the first process's share of the averages alone was saved."""
    theirs = trained("november", by_shape=True)
    state = files_of(theirs, "8")["optim_000013_rank0.pt"]
    folder = theirs.save(tmp_path / "base_checkpoints" / "d4", {"optim_000013.pt": state})
    message = r"optim_000013\.pt: exp_avg of lm_head\.weight is one process's share of 8, and in October 2025.*alone; "
    with pytest.raises(CheckpointError, match=message + "--weights-only converts the model without it"):
        convert(folder, tmp_path / "run", "nanochat", tokenizer=tokenizer())
    assert not (tmp_path / "run").exists()
    convert(folder, tmp_path / "run", "nanochat", weights_only=True)
    assert plait.load(tmp_path / "run").vocab_size == 96


@both
def test_a_run_goes_back_to_nanochat(name: str, tmp_path: Path) -> None:
    """Its checkpoint in nanochat's layout, read again: the same state, and the counts of the further steps."""
    saved(name, tmp_path / "base_checkpoints" / "d4")
    convert(tmp_path / "base_checkpoints", tmp_path / "run", "nanochat", tokenizer=tokenizer())
    result = train(settings(tmp_path), resume=tmp_path / "run", quiet=True)
    assert result.checkpoint is not None
    model = plait.load(result.checkpoint)
    optimizer = optimizer_of(tmp_path / "run", model)
    write(model, tmp_path / "back", step=LAST, optimizer=optimizer)
    files = optimizer_files(tmp_path / "back", LAST)
    assert len(files) == 1
    found = read_optimizer(files, read(tmp_path / "back")[0].config).tensors
    state = optimizer.state()
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    assert {float(value) for key, value in found.items() if key.startswith("step.")} == {3 + LAST - BEGUN}
