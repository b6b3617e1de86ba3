"""`plait info`: the numbers of a stack, without the memory of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plait.cli.stack import parts_line, stack_of
from plait.config.recipes import preset_names
from plait.config.schema import ModelConfig
from plait.models.model import Model
from tests.cli.conftest import TINY, Run


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_adds_up(preset: str) -> None:
    model = Model(ModelConfig(preset=preset, vocab_size=1000), device="meta")
    stack = stack_of(model, 64)
    counts = model.parameter_counts()
    assert stack.parameters == counts["total"] == sum(row.parameters for row in stack.layers)
    assert sum(stack.parts.values()) == stack.parameters
    assert all(n >= 0 for n in stack.parts.values())
    assert len(stack.layers) == len(model.blocks) + 2
    assert stack.flops * 64 == pytest.approx(model.flops(64))
    assert sum(row.flops for row in stack.layers) == pytest.approx(stack.flops)
    assert parts_line(stack).startswith("embedding ")


def test_the_state_is_the_cache_that_the_model_makes() -> None:
    config = ModelConfig(
        pattern="M2 T lstm", d_model=32, vocab_size=50, attention={"n_head": 2}, mamba2={"headdim": 8}
    )
    for length in (1, 40):
        stack = stack_of(Model(config, device="meta"), length)
        assert stack.state == Model(config).new_cache(1, length).nbytes
    attention, recurrent = stack.layers[2], stack.layers[3]
    shorter = stack_of(Model(config, device="meta"), 20)
    assert attention.state == 2 * shorter.layers[2].state
    assert recurrent.state == shorter.layers[3].state


def test_flops_of_dense_layers_are_two_a_parameter() -> None:
    model = Model(ModelConfig(pattern="gru", d_model=32, vocab_size=50, mlp="gelu", n_layer=1), device="meta")
    block = stack_of(model, 16).layers[1]
    matrices = sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)
    assert block.flops == pytest.approx(2 * matrices, rel=0.05)


def test_a_table_for_a_name_a_file_and_a_run(plait: Run, trained: Path, tmp_path: Path) -> None:
    hybrid = plait("info", "hybrid", "--length", "1024")
    assert hybrid.status == 0
    assert "0 - 2, each   mamba2" in hybrid.out and "3             attention" in hybrid.out
    assert "MiB" in hybrid.out and "tokens of one sequence" in hybrid.out
    (tmp_path / "m.json").write_text(json.dumps({"model": {"pattern": "M M3", "d_model": 64}}))
    changed = plait("info", "m.json", "--model.d-model", "128", "--model.pattern=rnn")
    assert "d_model 128" in changed.out and "rnn" in changed.out and "mamba3" not in changed.out
    newest = trained / "checkpoints" / "step-00000002"
    run, checkpoint = plait("info", trained), plait("info", newest)
    assert run.status == checkpoint.status == 0
    assert "2 layers, d_model 16, vocabulary 260" in run.out
    assert run.out.replace(str(trained), "") == checkpoint.out.replace(str(newest), "")
    assert "holds a trained model" in plait("info", trained, "--model.d_model=5").error


def test_a_model_of_a_trillion_parameters_takes_no_memory(plait: Run) -> None:
    ran = plait("info", "gpt2", "--model.d_model=24576", "--model.n_layer=96", "--model.attention.n_head=96")
    assert ran.status == 0 and "0 - 95, each" in ran.out
    assert any(f"{n}G parameters" in ran.out for n in range(600, 800)) or "T parameters" in ran.out


def test_not_causal_models_have_no_state(plait: Run) -> None:
    assert "none" in plait("info", "bert").out


def test_a_vocabulary_that_is_not_known_yet_is_said_to_be_assumed(plait: Run) -> None:
    ran = plait("info", "tiny", "--tokenizer.type=bpe", "--tokenizer.vocab_size=300")
    assert "vocabulary of 300 is assumed" in ran.out and "vocabulary 300," in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tyny"], "neither a file nor a recipe or preset; there are "),
        (["hybrd"], "did you mean 'hybrid'?"),
        (["missing.yaml"], "missing.yaml: there is no such file"),
        (["empty"], "holds no model"),
        (["hybrid", "--model.d_modle=4"], "did you mean 'model.d_model'?"),
        (["hybrid", "--model.pattern=M2 Q"], "'Q' is not a kind of mixer"),
    ],
)
def test_what_there_is_not(plait: Run, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    ran = plait("info", *words)
    assert ran.status == 1 and ran.out == "" and said in ran.error


def test_nothing_is_allocated(plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    earlier = torch.nn.Module.__init__

    def watched(self: torch.nn.Module, *args: object, **more: object) -> None:
        devices.append(torch.empty(0).device)
        earlier(self, *args, **more)

    monkeypatch.setattr(torch.nn.Module, "__init__", watched)
    assert plait("config", "validate", *TINY).status == 0
    inside = devices[1:]  # the model itself is made outside of its device
    assert inside and all(device.type == "meta" for device in inside)
