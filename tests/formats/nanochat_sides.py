"""nanochat's side of a comparison: training from its fixtures, saved as it saves, and how far ours is from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.config.schema import ModelConfig
from plait.formats.nanochat import from_state_dict, read_meta
from plait.formats.nanochat_layout import model_config, to_theirs
from plait.formats.native import weights
from plait.models.model import Model
from tests.formats.nanochat_optimizers import (
    July,
    Weights,
    loss_of,
    november,
    october,
    set_gradients,
    shares,
    weights_of,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
OCTOBER, JULY = FIXTURES / "nanochat_oct2025", FIXTURES / "nanochat_jul2026"
# November's processes share the rows of the tables, which therefore are 96 of October's 97.
FOLDERS = {"october": OCTOBER, "november": OCTOBER, "july": JULY}
WIDTH, STEPS, FURTHER = 32, 3, 3


def source(name: str) -> Path:
    return FOLDERS[name] / "base_checkpoints" / "d4" / "model_000010.pt"


@cache
def meta_of(name: str) -> dict[str, Any]:
    meta = read_meta(source(name))
    if name == "november":
        meta["model_config"]["vocab_size"] = 96
    return meta


@cache
def tensors_of(name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(source(name), weights_only=True)
    return {n: t[:96] if name == "november" and len(t) == 97 else t for n, t in tensors.items()}


def config_of(name: str) -> ModelConfig:
    return ModelConfig.model_validate(model_config(meta_of(name)))


@cache
def batches(name: str) -> list[tuple[Tensor, Tensor]]:
    """Different ones for each step: the fixture's rows, moved."""
    data = load_file(FOLDERS[name] / "oracle.safetensors")
    last = meta_of(name)["model_config"]["vocab_size"] - 1
    ids, targets = (data[what].long().clamp(max=last) for what in ("input_ids", "targets"))
    return [(ids.roll(7 * n, 1), targets.roll(7 * n, 1)) for n in range(STEPS + FURTHER)]


@dataclass
class Theirs:
    """nanochat's side after some steps."""

    name: str
    weights: Weights
    optimizers: list[torch.optim.Optimizer]

    def advance(self, some: Sequence[tuple[Tensor, Tensor]]) -> Theirs:
        model = from_state_dict(tensors_of(self.name), meta_of(self.name)).train()
        for ids, targets in some:
            set_gradients(model, self.weights, lambda ids=ids, targets=targets: loss_of(model, ids, targets))
            for optimizer in self.optimizers:
                optimizer.step()
        return self

    def state(self) -> Any:
        found = [optimizer.state_dict() for optimizer in self.optimizers]
        return found[0] if self.name == "july" else found

    def save(self, folder: Path, states: dict[str, Any], **meta: Any) -> Path:
        """The files of nanochat's after step 13; ``states``: what each optimizer's file holds."""
        folder.mkdir(parents=True, exist_ok=True)
        for file, state in states.items():
            torch.save(state, folder / file)
        torch.save({n: w.detach() for n, w in self.weights.items()}, folder / "model_000013.pt")
        values = {**meta_of(self.name), "step": 13, **meta}
        (folder / "meta_000013.json").write_text(json.dumps(values))
        return folder


def begun(name: str, by_shape: bool = False, **settings: Any) -> Theirs:
    own = weights_of(tensors_of(name))
    made = [July(own, WIDTH, **settings)] if name == "july" else october(own, WIDTH, by_shape)
    return Theirs(name, own, made)


def trained(name: str, by_shape: bool = False) -> Theirs:
    return begun(name, by_shape).advance(batches(name)[:STEPS])


def files_of(theirs: Theirs, kind: str) -> dict[str, Any]:
    """The optimizers' files: "one" process, or ranks of that many."""
    state = theirs.state()
    if kind == "one":
        return {"optim_000013.pt" if theirs.name == "october" else "optim_000013_rank0.pt": state}
    cut = november if theirs.name == "november" else shares
    return {f"optim_000013_rank{r}.pt": part for r, part in enumerate(cut(state, int(kind)))}


def begun_on(theirs: Theirs) -> list[torch.optim.Optimizer]:
    return october(theirs.weights, WIDTH) if theirs.name == "october" else [July(theirs.weights, WIDTH)]


def far(model: Model, theirs: Theirs) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile of the differences of every tensor that is outside July's tolerances for them."""
    found = {}
    for name, tensor in to_theirs(weights(model), model.config).items():
        errors = (tensor - theirs.weights[name].detach()).abs().flatten().sort().values
        median, late = (float(errors[int(share * (len(errors) - 1))]) for share in (0.5, 0.99))
        if median > 1e-6 or late > 1e-4:
            found[name] = (median, late)
    return found
