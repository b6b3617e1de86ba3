"""What went wrong in Model Foundry, one test for each, named after it; number 13 is where surprisal is."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait
from plait.compat.foundry.architectures import create_model_from_config, get_registered_architectures
from plait.compat.foundry.architectures.mamba import MambaModel
from plait.compat.foundry.cli import main
from plait.compat.foundry.config import ExperimentConfig, ModelConfig
from plait.compat.foundry.data_collators import CausalLMDataCollator
from plait.compat.foundry.trainer import Trainer
from plait.config.errors import CheckpointError, TrainingError
from plait.config.load import load_config
from plait.config.timetable import CheckpointSchedule
from plait.formats.foundry import from_state_dict
from plait.tokenizers.sentencepiece import SentencePieceTokenizer
from plait.training import step as training_step
from plait.training import train
from plait.training.timetable import Epochs, scheduled_steps
from tests.invariants import redraw, rms

V = 20
MAMBA = {"d_model": 24, "n_layers": 2, "d_state": 8, "dropout": 0.1}
TRANSFORMER = {
    "layers": 2,
    "embedding_size": 24,
    "hidden_size": 24,
    "intermediate_hidden_size": 40,
    "attention_heads": 2,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
RNN = {"embedding_size": 24, "hidden_size": 32, "num_layers": 1, "dropout": 0.1}
SECTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"transformer": TRANSFORMER},
    "bert": {"transformer": TRANSFORMER},
    "lstm": {"rnn": RNN},
    "gru": {"rnn": RNN},
    "rnn": {"rnn": RNN},
    "mamba": {"mamba": MAMBA},
}
CAUSAL = ["gpt2", "lstm", "gru", "rnn", "mamba"]
every = pytest.mark.parametrize("architecture", list(SECTIONS))


def experiment(architecture: str, **sections: Any) -> ExperimentConfig:
    values = {
        "model": {"architecture": architecture, **SECTIONS[architecture]},
        "tokenizer": {"vocab_size": V},
    }
    return ExperimentConfig(**{**values, **sections})


def make(architecture: str = "mamba") -> Any:
    torch.manual_seed(0)
    return create_model_from_config(experiment(architecture))


def drawn(architecture: str = "mamba") -> Any:
    model = make(architecture).eval()
    redraw(model.model)
    return model


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


def small_run(folder: Path, architecture: str = "mamba", **training: Any) -> ExperimentConfig:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and sleeps. " * 40)
    return experiment(
        architecture,
        data={"training_corpus": "text.txt", "batch_size": 2, "max_sequence_length": 32},
        tokenizer={"tokenizer_type": "character"},
        training={"output_dir": "out", "learning_rate": 1e-2, **training},
        logging={"console_level": "ERROR", "log_metrics_every_n_steps": 1},
    )


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def losses_on_random_tokens(architecture: str, *, shifted: bool) -> float:
    """Mean loss of the last of some steps of training on fresh uniform random tokens."""
    model = make(architecture)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for step in range(50):
        ids = tokens(8, 24, seed=step)
        output = model(ids, labels=ids)
        loss = output.loss if shifted else F.cross_entropy(output.logits.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize("architecture", CAUSAL)
def test_1_labels_are_shifted_exactly_once_for_every_architecture(architecture: str) -> None:
    """Nothing can be learnt of random tokens; unshifted, as the original's loss was, copying is learnt at once."""
    assert losses_on_random_tokens(architecture, shifted=True) >= math.log(V) - 0.02
    assert losses_on_random_tokens(architecture, shifted=False) < 0.7 * math.log(V)


@torch.no_grad()
def test_2_there_is_one_mamba_and_it_reads_its_state_through_C() -> None:
    model, ids = drawn(), tokens()
    before = model(ids).logits
    for rows in (slice(0, 2), slice(2, 10), slice(10, 18)):  # time step, B, C
        changed = drawn()
        for layer in changed.layers:
            layer.mixer.x_proj.weight[rows] += 0.5
        assert rms(changed(ids).logits, before) > 1e-2
    names = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    theirs = {"embedding.weight": names["embedding.tokens.weight"]}
    for index in range(2):
        mixer = {n: t for n, t in names.items() if n.startswith(f"blocks.{index}.mixer.")}
        theirs |= {n.replace("blocks", "layers"): t for n, t in mixer.items()}
        theirs |= {f"layers.{index}.norm.{n}": names[f"blocks.{index}.norm1.{n}"] for n in ("weight", "bias")}
    theirs |= {f"norm_f.{n}": names[f"final_norm.{n}"] for n in ("weight", "bias")}
    assert torch.equal(from_state_dict(theirs, {})(ids).logits, before), "a checkpoint of a GPU runs on a CPU"
    stand_in = dict(theirs)
    for index in range(2):
        stand_in[f"layers.{index}.mixer.x_proj.weight"] = torch.zeros(16, 48)
        stand_in[f"layers.{index}.mixer.dt_proj.weight"] = torch.zeros(48, 48)
    with pytest.raises(CheckpointError, match="not Mamba"):
        from_state_dict(stand_in, {})


@torch.no_grad()
def test_3_layers_norm_their_input_and_dropout_never_zeroes_the_residual_stream() -> None:
    torch.manual_seed(0)
    model = MambaModel(V, 24, 2, dropout=0.5)
    redraw(model.model)
    model.train()
    ids = tokens()
    for layer in model.layers:
        layer.mixer.out_proj.weight.zero_()
    assert torch.equal(model(ids).hidden_states, model.norm(model.embedding(ids))), (
        "the identity path lost something"
    )
    model, seen = drawn(), []
    hook = model.layers[0].mixer.register_forward_pre_hook(lambda mixer, given: seen.append(given[0]))
    model(ids)
    hook.remove()
    norm = model.layers[0].norm1
    assert isinstance(norm, nn.LayerNorm) and torch.equal(seen[0], norm(model.embedding(ids)))


@pytest.mark.parametrize("architecture", list(SECTIONS))
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_4_attention_mask_matters(architecture: str, side: str) -> None:
    """Pads on either side change nothing, whatever stands there."""
    model, ids = drawn(architecture), tokens(1)
    pads = tokens(1, 5, seed=7)
    parts = [pads, ids] if side == "left" else [ids, pads]
    mask = torch.cat([torch.full_like(part, part is ids) for part in parts], 1)
    alone = model(ids).logits
    padded = model(torch.cat(parts, 1), attention_mask=mask).logits[mask.bool()]
    assert rms(padded, alone[0]) < 1e-5
    unmasked = model(torch.cat(parts, 1)).logits[mask.bool()]
    if side == "left" or architecture == "bert":
        assert rms(unmasked, alone[0]) > 1e-3


@every
def test_5_a_config_without_the_section_of_its_architecture_is_refused(architecture: str) -> None:
    section = next(iter(SECTIONS[architecture]))
    with pytest.raises(ValueError, match=f"requires '{section}' configuration"):
        ModelConfig(architecture=architecture)
    assert ModelConfig(architecture=architecture, **SECTIONS[architecture]).architecture == architecture


@every
def test_6_derived_properties_are_there_for_every_architecture(architecture: str) -> None:
    model = experiment(architecture).model
    assert (model.layers, model.hidden_size, model.embedding_size) == {
        "rnn": (1, 32, 24),
        "transformer": (2, 24, 24),
        "mamba": (2, 24, 24),
    }[model.section_name]
    assert model.dropout == 0.1
    assert model.attention_heads == (2 if architecture in ("gpt2", "bert") else None)


def test_6_the_first_mamba_checkpoint_does_not_kill_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Trainer(small_run(tmp_path, train_steps=2, checkpoint_schedule=[1])).train()
    checkpoints = sorted((result.run / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000001", "step-00000002"]
    told = json.loads((checkpoints[0] / "trainer.json").read_text())
    assert told["step"] == 1 and told["tokens"] == 2 * 32
    described = load_config(checkpoints[0] / "config.yaml")
    assert [layer.kind for layer in described.model.layers()] == [
        "mamba",
        "mamba",
    ] and described.model.d_model == 24
    (tmp_path / "mamba.yaml").write_text("model: {architecture: mamba, mamba: {d_model: 24, n_layers: 2}}")
    assert main(["validate-config", "mamba.yaml"]) == 0
    assert "mamba, 2 layers" in capsys.readouterr().out


@every
def test_7_errors_are_not_swallowed_and_the_vocabulary_is_known(architecture: str, monkeypatch: Any) -> None:
    model = make(architecture)
    assert model.vocab_size == V

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernel failed")

    monkeypatch.setattr(model.layers[0].mixer, "forward", fail)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        model(tokens(), labels=tokens())


@every
def test_8_from_config_takes_what_it_says(architecture: str) -> None:
    cls = type(make(architecture))
    assert cls.from_config(experiment(architecture)).model_type == architecture
    with pytest.raises(TypeError, match="use_fast"):
        cls.from_config(experiment(architecture), use_fast=True)


@every
def test_9_no_row_is_frozen_and_pads_are_the_tokenizers(architecture: str) -> None:
    model = drawn(architecture)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    ids[:, 4:] = 3
    model(ids, labels=ids).loss.backward()
    assert model.embedding.padding_idx is None
    assert bool(model.embedding.weight[0].any()) and bool(model.embedding.weight.grad[0].any())
    tokenizer = SentencePieceTokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, 300)
    assert tokenizer.unk_id == 0, "id 0 is a token like any other"
    batch = CausalLMDataCollator(tokenizer)([{"input_ids": [5]}, {"input_ids": [5, 6, 7]}])
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {tokenizer.pad_id}
    assert tokenizer.pad_id not in (None, 0)


def test_10_nothing_overwrites_the_initial_time_steps() -> None:
    model = make()
    for layer in model.layers:
        mixer = layer.mixer
        steps = F.softplus(mixer.dt_proj.bias.detach())
        low, high, spread = (float(f(steps)) for f in (torch.min, torch.max, torch.std))
        assert low >= 1e-3 * (1 - 1e-5) and high <= 0.1 * (1 + 1e-5) and spread > 1e-3
        assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 9.0).expand(48, 8))
        assert torch.equal(mixer.D, torch.ones(48))


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "mamba"])
def test_11_resizing_keeps_the_tie(architecture: str) -> None:
    model = make(architecture)
    model.resize_token_embeddings(V + 8)
    assert model.lm_head.weight is model.embedding.weight
    ids = tokens()
    before = model.embedding.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.embedding.weight, before) and model.lm_head.weight is model.embedding.weight


@every
def test_11_building_a_model_needs_no_network(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert make(architecture).get_parameter_count() > 0


def test_11_transformers_is_not_asked() -> None:
    code = "import sys, plait.compat.foundry.cli; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_12_a_resumed_run_trains_the_model_that_it_shows(tmp_path: Path) -> None:
    """Stopped after two steps and resumed, four steps are the same bit for bit; the last two changed the weights."""
    config = small_run(tmp_path, train_steps=4, checkpoint_schedule=[2, 4])
    first = Trainer(config).train()
    weights = [first.model.state_dict(), plait.load(first.run / "checkpoints" / "step-00000002").state_dict()]
    shutil.rmtree(first.run / "checkpoints" / "step-00000004")
    resumed = config.replace(training=config.training.replace(resume_from_checkpoint=True))
    again = Trainer(resumed).train().model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights[0].items())
    assert not any(torch.equal(tensor, again[name]) for name, tensor in weights[1].items())
    assert [line["step"] for line in lines(first.run)] == [1, 2, 3, 4]


def test_12_a_step_is_an_update_of_the_weights(tmp_path: Path) -> None:
    """With accumulation k a step takes k batches, and the schedule of learning rates ends with the run."""
    config = small_run(tmp_path, train_steps=5, warmup_steps=0, gradient_accumulation_steps=3)
    result = Trainer(config).train()
    assert (result.step, result.tokens) == (5, 5 * 3 * 2 * 32)
    rates = [line["lr"] for line in lines(result.run)]
    assert rates == pytest.approx([1e-2 * (1 - step / 5) for step in range(5)])


def test_12_accumulation_changes_no_gradient(tmp_path: Path) -> None:
    weights = []
    for name, batch, passes in (("a", 6, 1), ("b", 2, 3)):
        folder = tmp_path / name
        folder.mkdir()
        config = small_run(folder, "lstm", train_steps=2, gradient_accumulation_steps=passes)
        config = config.replace(data=config.data.replace(batch_size=batch))
        config = config.replace(model={"architecture": "lstm", "rnn": {**RNN, "dropout": 0.0}})
        weights.append(Trainer(config, folder).train().model.embedding.tokens.weight)
    assert rms(weights[0], weights[1]) < 1e-4


@every
def test_12_gradient_checkpointing_is_there_for_every_architecture(architecture: str, tmp_path: Path) -> None:
    found = []
    for name, recompute in (("a", False), ("b", True)):
        folder = tmp_path / name
        folder.mkdir()
        objective = "masked_lm" if architecture == "bert" else "causal_lm"
        training = {"train_steps": 2, "objective": objective, "use_gradient_checkpointing": recompute}
        found.append(Trainer(small_run(folder, architecture, **training), folder).train().loss)
    assert found[0] == found[1]


def test_12_the_loss_scale_of_float16_goes_on_after_a_resume(tmp_path: Path) -> None:
    values = Trainer(small_run(tmp_path, "lstm", train_steps=2)).run.to_dict()
    values["training"] |= {"precision": "fp16", "checkpoint_every": 1, "keep_checkpoints": 9}
    run = train(values, quiet=True).run
    state = run / "checkpoints" / "step-00000001" / "trainer.json"
    told = json.loads(state.read_text())
    assert told["scaler"]["good_steps"] == 1 and told["scaler"]["scale"] > 1
    values["training"]["steps"] = 3
    train(values, resume="auto", quiet=True)
    later = json.loads((run / "checkpoints" / "step-00000003" / "trainer.json").read_text())["scaler"]
    assert later == {"scale": told["scaler"]["scale"], "good_steps": 3}


def test_12_log_spacing_of_later_epochs_is_logarithmic() -> None:
    schedule = CheckpointSchedule(first_epoch=3, later_epochs="log", base=2, min_interval=4, min_per_epoch=2)
    steps = scheduled_steps(schedule, 300, Epochs(rows=200, batch_rows=2))
    assert steps == [0, 50, 100, 104, 108, 116, 132, 164, 200, 204, 208, 216, 232, 264, 300]
    inside = [step - 100 for step in steps if 100 < step < 200]
    assert all(after == 2 * before for before, after in pairwise(inside))
    assert max(steps) <= 300


def test_12_running_out_of_memory_stops_the_run_and_skips_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(small_run(tmp_path, train_steps=3))
    real, calls = training_step.train_step, []

    def full(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(*arguments)

    monkeypatch.setattr("plait.training.trainer.train_step", full)
    with pytest.raises(TrainingError, match="micro_batch_tokens"):
        trainer.train()
    assert len(calls) == 2


def test_12_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    before = torch.backends.cudnn.benchmark
    courses = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        courses.append(
            [line["loss"] for line in lines(Trainer(small_run(folder, train_steps=3), folder).train().run)]
        )
    assert courses[0] == courses[1] and torch.backends.cudnn.benchmark == before


def test_every_architecture_is_looked_at() -> None:
    assert set(SECTIONS) == set(get_registered_architectures())
