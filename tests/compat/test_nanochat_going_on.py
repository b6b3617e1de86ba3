"""The faces go on from nanochat's own files with its optimizers' state: its calls, and base_train of July 2026."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import plait
from plait.compat.nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from plait.compat.nanochat.common import run_script
from plait.compat.nanochat.gpt import GPT, GPTConfig
from plait.compat.nanochat.scripts import base_train, tok_train
from plait.config.errors import CheckpointError
from plait.formats.folders import list_checkpoints
from plait.formats.foreign import unwrapped
from plait.formats.nanochat import write
from plait.formats.nanochat_files import optimizer_files
from plait.formats.nanochat_optimizer import read_optimizer
from plait.training.adopt import optimizer_of
from tests.formats.nanochat_sides import Theirs, batches, begun, config_of, files_of, meta_of, trained
from tests.training.test_core import WORDS

JULY = ["--release=2026", "--depth=2", "--aspect-ratio=16", "--head-dim=32", "--total-batch-size=128"]
JULY += ["--max_seq_len=32", "--device_batch_size=2", "--eval_tokens=64", "--device_type=cpu"]
JULY += ["--sample_every=-1", "--num-iterations=6", "--warmup-steps=2"]


def equal(one: Any, other: Any) -> bool:
    """Whether two state dicts hold the same tensors and numbers, in the same places."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def loaded(folder: Path) -> tuple[GPT, list[torch.optim.Optimizer]]:
    """A face with the weights and the optimizers' states of step 13, by nanochat's own lines."""
    tensors, states, meta = load_checkpoint(folder, 13, "cpu", load_optimizer=True)
    model = GPT(GPTConfig(**meta["model_config"]))
    model.load_state_dict(unwrapped(tensors))
    optimizers = model.setup_optimizers(matrix_lr=0.5)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    return model, optimizers


def test_the_faces_optimizers_take_nanochats_states_in_and_give_them_back(tmp_path: Path) -> None:
    theirs = trained("october")
    theirs.optimizers[1].param_groups[0]["lr"] = 0.013  # where its schedule was
    folder = theirs.save(tmp_path / "d4", files_of(theirs, "one"))
    model, optimizers = loaded(folder)
    wanted = read_optimizer(optimizer_files(folder, 13), config_of("october")).tensors
    names = {id(p): name for name, p in model.model.named_parameters()}
    found = {
        f"{what}.{names[id(p)]}": value
        for part in optimizers
        for p, entry in part.state.items()
        for what, value in entry.items()
    }
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    rates = {(group["lr"], group["initial_lr"]) for group in optimizers[1].param_groups}
    assert rates == {(0.013, 0.02)}, "the file's, as load_state_dict has it, not the 0.5 of before"
    theirs.optimizers[1].param_groups[1]["lr"] = 0.013  # ours are one group
    for group in theirs.optimizers[1].param_groups[2:]:
        group["lr"] = 0.013
    save_checkpoint(
        tmp_path / "again", 13, model.state_dict(), [o.state_dict() for o in optimizers], meta_of("october")
    )
    saved = torch.load(tmp_path / "again" / "optim_000013.pt", weights_only=True)
    assert equal(saved[0]["state"], theirs.state()[0]["state"]) and equal(saved[1], theirs.state()[1])
    fresh = begun("october")  # and nanochat's own optimizers take that
    for optimizer, state in zip(fresh.optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    assert equal(fresh.state()[1], theirs.state()[1])


def test_the_faces_further_steps_follow_the_state(tmp_path: Path) -> None:
    """From the state they are other steps than from none, and the same as after saving and loading once more."""
    theirs = trained("october")
    folder = theirs.save(tmp_path / "d4", files_of(theirs, "one"))

    def further(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
        for ids, targets in batches("october")[3:5]:
            model(ids, targets).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return dict(model.state_dict())

    model, optimizers = loaded(folder)
    meta = {**meta_of("october"), "step": 13}
    save_checkpoint(tmp_path / "b", 13, model.state_dict(), [o.state_dict() for o in optimizers], meta)
    first, second = further(model, optimizers), further(*loaded(tmp_path / "b"))
    assert equal(first, second)
    blank, _ = loaded(folder)
    without = further(blank, blank.setup_optimizers())
    assert not any(torch.equal(first[name], without[name]) for name in first)


def test_optimizers_that_made_no_step_have_no_state(tmp_path: Path) -> None:
    model = GPT(GPTConfig(**meta_of("october")["model_config"]))
    states = [optimizer.state_dict() for optimizer in model.setup_optimizers()]
    assert [state["state"] for state in states] == [{}, {}]
    assert equal(states[1]["param_groups"], begun("october").state()[1]["param_groups"])
    for optimizer, state in zip(model.setup_optimizers(), states, strict=True):
        optimizer.load_state_dict(state)
    with pytest.raises(
        CheckpointError, match="the state dict is of another model: its groups have 1 tensors"
    ):
        model.setup_optimizers()[0].load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})


def test_of_several_processes_a_ranks_own_file_is_loaded(tmp_path: Path) -> None:
    theirs = trained("july")
    folder = theirs.save(tmp_path / "d4", files_of(theirs, "2"))
    for rank in (0, 1):
        state = load_checkpoint(folder, 13, load_optimizer=True, rank=rank)[1]
        assert equal(state, files_of(theirs, "2")[f"optim_000013_rank{rank}.pt"])


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nanochat's folder: two files of text and a tokenizer."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = random.Random(0)
    (tmp_path / "base_data").mkdir()
    for number in range(2):
        texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(20)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "base_data" / f"shard_{number:05}.parquet")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert tok_train.main(["--vocab_size=290"]) == 0
    return tmp_path


def test_base_train_goes_on_from_nanochats_files(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Six steps, and four of them written as nanochat's files with two steps from there, give the same weights."""
    assert base_train.main([*JULY, "--save-every=4"]) == 0
    whole = base / "whole"
    run = base / "base_checkpoints" / "d2"
    shutil.move(run, whole)
    checkpoint = list_checkpoints(whole)[0]
    assert checkpoint.name == "step-00000004"
    model = plait.load(checkpoint)
    meta = {"max_seq_len": 32, "total_batch_size": 128, "user_config": {"num_iterations": 6}}
    optimizer = optimizer_of(checkpoint, model)
    write(model, run, step=4, sequence_len=32, optimizer=optimizer, processes=2, meta=meta)
    assert len(optimizer_files(run, 4)) == 2 and not (run / "checkpoints").exists()
    assert json.loads((run / "meta_000004.json").read_text())["step"] == 4
    capfd.readouterr()
    assert base_train.main([*JULY, "--resume-from-step=4"]) == 0
    shown = capfd.readouterr().err
    assert "resumed at step 4" in shown and "step 6/6" in shown
    one, other = plait.load(whole).state_dict(), plait.load(run).state_dict()
    assert [path.name for path in list_checkpoints(run)] == ["step-00000006"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_base_train_needs_the_state_and_the_same_model(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = base / "base_checkpoints" / "d2"
    trained_on: Theirs = trained("july")
    trained_on.save(run, {})
    assert run_script(lambda: base_train.main([*JULY, "--resume-from-step=13"])) == 1
    assert "without optim_000013_rank0.pt, so training cannot go on" in capfd.readouterr().err
    trained_on.save(run, files_of(trained_on, "one"))
    assert run_script(lambda: base_train.main([*JULY, "--resume-from-step=13"])) == 1
    assert "the tokenizer has 290 ids, but the model 97" in capfd.readouterr().err
    assert run_script(lambda: base_train.main([*JULY, "--resume-from-step=12"])) == 1
    assert "there is no" in capfd.readouterr().err
