"""How many steps: given, by epochs, by tokens for each parameter, by operations; said, and never none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.training import TrainingConfig
from plait.models.model import Model
from plait.training import train
from plait.training.dry_run import dry_run
from plait.training.horizon import Horizon, horizon
from tests.training import runs

MODEL = Model(
    load_config({"model": {"d_model": 32, "pattern": "M2 T", "vocab_size": 50}}).model, device="meta"
)
COUNT = sum(parameter.numel() for parameter in MODEL.parameters())


def found(length: int = 64, batch_rows: int = 4, rows: int | None = 90, **training: Any) -> Horizon | None:
    return horizon(TrainingConfig.model_validate(training), MODEL, length, batch_rows, rows)


def test_the_rules() -> None:
    assert found(steps=7) == Horizon(7, "")
    assert found(epochs=2) == Horizon(45, "2 epochs of 90 rows")
    assert found(epochs=2, rows=None) is None
    by_tokens = found(tokens_per_parameter=20)
    assert by_tokens is not None and by_tokens.steps == 20 * COUNT // 256
    assert by_tokens.reason == f"20 tokens for each of {COUNT:,} parameters"
    of_step = 3 * 4 * MODEL.flops(64)
    by_flops = found(flops=10.4 * of_step)
    assert by_flops is not None and by_flops.steps == 10 and "FLOPs" in by_flops.reason
    for rule in ({"tokens_per_parameter": 1e-6}, {"flops": 1.0}):
        least = found(**rule)
        assert least is not None and least.steps == 1


def test_nanochats_depth_20_takes_the_steps_that_it_is_known_for() -> None:
    """561 million parameters, 20 tokens each, 524,288 tokens a step: 21,400 steps."""
    config = load_config("nanochat", ["--model.vocab_size=65536"])
    model = Model(config.model, device="meta")
    rows = config.training.batch_tokens // config.data.sequence_length
    run = horizon(config.training, model, config.data.sequence_length, rows, None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 560_988_160
    assert run is not None and run.steps == 21_400


def test_one_rule_at_a_time() -> None:
    with pytest.raises(ConfigError, match="epochs and flops each set the number of steps; keep one"):
        TrainingConfig(epochs=1, flops=1e9)


def test_a_run_follows_its_rule_and_says_so(tmp_path: Path) -> None:
    config = runs.tiny(tmp_path, steps=999, tokens_per_parameter=0.1)
    screen = io.StringIO()
    result = train(config, console=Console(file=screen, width=300))
    count = sum(parameter.numel() for parameter in result.model.parameters())
    assert result.step == int(0.1 * count) // 160 > 1
    assert f"{result.step} steps (0.1 tokens for each of {count:,} parameters)" in screen.getvalue()


def test_a_dry_run_knows_the_rule() -> None:
    values = {"model": {"d_model": 32, "n_layer": 1, "vocab_size": 300}, "training": {"device": "cpu"}}
    by_tokens = dry_run(load_config(values, ["--training.tokens_per_parameter=9"]))
    assert by_tokens.steps == 9 * by_tokens.parameters["total"] // 16384 and by_tokens.fastest is not None
    by_epochs = dry_run(load_config(values, ["--training.epochs=2"]))
    assert by_epochs.steps is None and by_epochs.fastest is None
    text = "\n".join(by_epochs.lines())
    assert "as many steps as the epochs make" in text and "depends on the data" in text
