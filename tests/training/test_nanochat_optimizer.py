"""Two steps of nanochat's own optimizers, of October 2025 and July 2026, by the shipped recipes' settings.

The tolerances are those of tests/fixtures/nanochat_*/README.md. Adam's first steps are nearly the sign of the
gradient, so what is compared is mostly medians and percentiles.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.config.load import load_config
from plait.config.training import TrainingConfig
from plait.formats.nanochat import read
from plait.formats.nanochat_layout import to_theirs
from plait.formats.native import weights
from plait.models.loss import cross_entropy
from plait.models.model import Model
from plait.training.muon import Muon
from plait.training.optimizers import Optimizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = {"october": FIXTURES / "nanochat_oct2025", "july": FIXTURES / "nanochat_jul2026"}
RECIPES = {"october": "nanochat", "july": "nanochat2026"}
# The oracle took the defaults of July's optimizer, its recipe has other rates; and it ran in float32.
JULY_DEFAULTS = {
    "embedding_lr": 0.2,
    "unembedding_lr": 0.004,
    "weight_decay": 0.0,
    "muon": {"momentum": 0.95, "precision": "fp32"},
    "groups": {"*.value_embedding.table.weight": {"lr": 0.1}},
}
MATRICES = ("c_q", "c_fc", "c_proj")


def training_of(name: str, **muon: Any) -> TrainingConfig:
    """The recipe's training, with the rates of the oracle; ``muon`` changes single settings of it."""
    values = load_config(RECIPES[name]).to_dict()["training"]
    for key, value in JULY_DEFAULTS.items() if name == "july" else ():
        if key == "groups":
            assert isinstance(value, dict)
            for pattern, own in value.items():
                values["groups"][pattern] |= own
        elif isinstance(value, dict):
            values[key] |= value
        else:
            values[key] = value
    values["muon"] |= muon
    return TrainingConfig.model_validate(values)


@cache
def steps_of(name: str) -> dict[str, Tensor]:
    return load_file(FOLDERS[name] / "optimizer_steps.safetensors")


def two_steps(name: str, training: TrainingConfig) -> dict[str, Tensor]:
    """Losses before, between and after, and nanochat's tensors after each step."""
    oracle = load_file(FOLDERS[name] / "oracle.safetensors")
    model: Model = read(FOLDERS[name] / "base_checkpoints" / "d4" / "model_000010.pt")[0].train()
    optimizer = Optimizer(model, training)

    def loss() -> Tensor:
        targets = oracle["targets"].long()
        total, count = cross_entropy(
            model(oracle["input_ids"].long()).logits, targets.masked_fill(targets < 0, -100)
        )
        return total / count

    found, losses = {}, []
    for step in (1, 2):
        optimizer.zero_grad()
        before = loss()
        losses.append(before.detach())
        before.backward()
        optimizer.step()
        theirs = to_theirs({n: t.clone() for n, t in weights(model).items()}, model.config)
        found |= {f"step{step}.{key}": tensor for key, tensor in theirs.items()}
    return {**found, "losses": torch.stack([*losses, loss().detach()])}


def errors(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Absolute errors of every tensor that the oracle has, in rising order."""
    return {
        key: (found[key] - wanted).abs().flatten().sort().values for key, wanted in steps_of(name).items()
    }


def at(sorted_errors: Tensor, share: float) -> float:
    return float(sorted_errors[min(len(sorted_errors) - 1, int(share * len(sorted_errors)))])


def outside_october(found: dict[str, Tensor]) -> list[str]:
    """The tensors that miss October's tolerances."""
    wrong = []
    for key, error in errors(found, "october").items():
        if key == "losses":
            fits = float(error[-1]) < 5e-3
        elif key.split(".")[-2] in MATRICES:
            fits = at(error, 0.5) < 2e-4 and float(error[-1]) < 2e-3
        elif key.startswith("step1"):
            fits = float(error[-1]) < 1e-5
        else:
            fits = at(error, 0.5) < 1e-4 and at(error, 0.99) < 5e-3
        wrong += [] if fits else [key]
    return wrong


def outside_july(found: dict[str, Tensor]) -> list[str]:
    """The tensors that miss July's tolerances."""
    wrong = []
    for key, error in errors(found, "july").items():
        if key == "losses":
            fits = float(error[-1]) < 1e-4
        else:
            fits = at(error, 0.5) < 1e-6 and at(error, 0.99) < 1e-4
        wrong += [] if fits else [key]
    return wrong


def test_october() -> None:
    assert outside_october(two_steps("october", training_of("october"))) == []


def test_july() -> None:
    assert outside_july(two_steps("july", training_of("july"))) == []


OTHER_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "october": [{"parts": False}, {"scale": "adamw"}, {"momentum": 0.85}],
    "july": [
        {"parts": False},
        {"scale": "adamw"},
        {"method": "newton_schulz"},
        {"equal_rows": False},
        {"renormalise": False},
        {"beta2": None},
        {"beta2": 0.95},
        {"precision": "bf16"},
        {"momentum": 0.97},
    ],
}


@pytest.mark.parametrize(
    ("name", "muon"), [(name, muon) for name, settings in OTHER_SETTINGS.items() for muon in settings]
)
def test_another_setting_would_show(name: str, muon: dict[str, Any]) -> None:
    found = two_steps(name, training_of(name, **muon))
    wrong = outside_october(found) if name == "october" else outside_july(found)
    assert any(key.startswith("step2.transformer.h.") for key in wrong)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_groups_are_theirs(name: str) -> None:
    """Every parameter has the rate, averages, eps and decay that the original gave it."""
    recorded = json.loads((FOLDERS[name] / "optimizer_steps.json").read_text())["groups"]
    model = read(FOLDERS[name] / "base_checkpoints" / "d4" / "model_000010.pt")[0]
    optimizer = Optimizer(model, training_of(name))
    names = {id(parameter): own for own, parameter in optimizer.named.items()}
    ours: dict[str, dict[str, Any]] = {}
    for part in optimizer.parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                ours[names[id(parameter)]] = {**group, "muon": isinstance(part, Muon)}

    def of(theirs: str) -> dict[str, Any]:
        """Our group of one of their tensors: mark it, and see which of ours turns into it."""
        marks = {own: torch.zeros_like(p) for own, p in model.named_parameters()}
        for own in marks:
            marked = to_theirs(
                {k: torch.ones_like(v) if k == own else v for k, v in marks.items()}, model.config
            )
            if marked[theirs].any():
                return ours[own]
        raise AssertionError(theirs)

    count = 0
    for group in recorded:
        by_muon = group["optimizer"] == "Muon" or group.get("kind") == "muon"
        for theirs in group["params"]:
            own = of(theirs)
            assert own["muon"] == by_muon, theirs
            assert own["peak"] == pytest.approx(group["lr"]), theirs
            assert own["weight_decay"] == group.get("weight_decay", 0.0), theirs
            if by_muon:
                assert own["momentum"] == group["momentum"]
            else:
                assert list(own["betas"]) == group["betas"] and own["eps"] == group["eps"], theirs
            count += 1
    assert count == len(to_theirs(weights(model), model.config))
