"""A training step on the host's side: it waits for the device once, and what is recomputed changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plait.config.errors import ConfigError
from plait.config.training import TrainingConfig
from plait.training import trainer as trainer_module
from plait.training.distributed import World
from plait.training.memory import step_memory
from plait.training.wrap import kept
from tests.training import runs
from tests.training.test_estimate import CPU, load_config, model_config

HERE = World(0, 1, CPU)
MODES = ("none", "block", "selective")


class Calls(TorchDispatchMode):
    """The names of all operators that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_of_a_step_is_read_number_by_number(tmp_path: Path) -> None:
    """``item`` and ``float`` of a tensor wait for the device; the one look at loss and norm reads both at once."""
    model = {"pattern": "attention mamba2 mamba", "mamba2": {"headdim": 8}}
    config = runs.tiny(tmp_path, model=model, micro_batch_tokens=32)
    parts = trainer_module.set_up(config, tmp_path, None, HERE)
    batches = parts.batches(HERE)
    assert len(batches) > 1
    n_targets = sum(batch.n_targets for batch in batches)
    with Calls() as calls:
        update = trainer_module.train_step(
            parts.forward,
            parts.objective,
            parts.optimizer,
            batches,
            n_targets,
            config.training,
            parts.scaler,
            HERE,
        )
    assert update.loss > 0 and update.grad_norm > 0
    assert calls.names.count("aten::_local_scalar_dense") == 0
    assert any("_fused_adamw" in name for name in calls.names)


@pytest.mark.parametrize("pattern", ["M2 T", "M T"])
def test_recomputing_changes_no_number_and_spares_the_scan(tmp_path: Path, pattern: str) -> None:
    numbers, scans, attentions = [], [], []
    for mode in MODES:
        model = {"pattern": pattern, "mamba2": {"headdim": 8}, "dropout": 0.1}
        config = runs.tiny(tmp_path, model=model, activation_checkpointing=mode)
        parts = trainer_module.set_up(config, tmp_path / mode, None, HERE)
        (batch,) = parts.batches(HERE)[:1]
        torch.manual_seed(0)
        with Calls() as calls:
            loss = parts.objective.run(parts.forward, batch).loss_sum
            assert loss is not None
            loss.backward()
        numbers.append([loss.detach(), *parts.optimizer.gradients()])
        scans.append(sum(name in ("plait::ssd_cpu", "plait::selective_scan_cpu") for name in calls.names))
        attentions.append(sum(name.startswith("aten::_scaled_dot_product") and "backward" not in name
                              for name in calls.names))  # fmt: skip
    assert scans == [1, 2, 1]
    assert attentions[1] == 2 * attentions[0] and attentions[2] == attentions[0] > 0
    for other in numbers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(numbers[0], other, strict=True))


def test_selective_lies_between() -> None:
    def activations(mode: str) -> int:
        config = load_config(model_config("M2 T M2 T", activation_checkpointing=mode))
        return step_memory(config.model, config.training, 8, 256, accumulate=False, device=CPU).activations

    none, block, selective = map(activations, MODES)
    assert block < selective < none


def test_what_selective_keeps() -> None:
    from plait.ops.selective_scan import cpu as _  # noqa: F401  registers its ops

    ops = torch.ops.plait
    assert kept(ops.selective_scan_cpu.default) and not kept(ops.selective_scan_cpu_backward.default)
    assert kept(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    assert not kept(torch.ops.aten.mm.default)


@pytest.mark.parametrize(("given", "mode"), [(True, "block"), (False, "none"), *((m, m) for m in MODES)])
def test_yes_and_no_are_modes(given: object, mode: str) -> None:
    config = TrainingConfig.model_validate({"activation_checkpointing": given})
    assert config.activation_checkpointing == mode
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        TrainingConfig.model_validate({"activation_checkpointing": "some"})
