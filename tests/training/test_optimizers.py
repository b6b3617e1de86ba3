"""Every parameter of every kind of mixer is in the right group, and the optimizers are torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plait.config.load import load_config
from plait.config.table import kinds
from plait.config.training import TrainingConfig
from plait.models.model import Model
from plait.training.optimizers import Optimizer, parameter_groups

MATRIX, VECTOR = "muon", "vector"
RECURRENT = {
    "rnn.weight_ih_l0": MATRIX,
    "rnn.weight_hh_l0": MATRIX,
    "rnn.bias_ih_l0": VECTOR,
    "rnn.bias_hh_l0": VECTOR,
}
# Every parameter of every kind and its group under Muon. A kind that is not here is held to the general rules alone.
GROUPS: dict[str, dict[str, str]] = {
    "attention": {"in_proj.weight": MATRIX, "out_proj.weight": MATRIX},
    "mamba": {
        "in_proj.weight": MATRIX,
        "conv1d.weight": VECTOR,
        "conv1d.bias": VECTOR,
        "x_proj.weight": MATRIX,
        "dt_proj.weight": MATRIX,
        "dt_proj.bias": VECTOR,
        "A_log": VECTOR,
        "D": VECTOR,
        "out_proj.weight": MATRIX,
    },
    "mamba2": {
        "in_proj.weight": MATRIX,
        "conv1d.weight": VECTOR,
        "conv1d.bias": VECTOR,
        "dt_bias": VECTOR,
        "A_log": VECTOR,
        "D": VECTOR,
        "norm.weight": VECTOR,
        "out_proj.weight": MATRIX,
    },
    "mamba3": {
        "in_proj.weight": MATRIX,
        "dt_bias": VECTOR,
        "B_norm.weight": VECTOR,
        "C_norm.weight": VECTOR,
        "B_bias": VECTOR,
        "C_bias": VECTOR,
        "D": VECTOR,
        "out_proj.weight": MATRIX,
    },
    "s4d": {
        "log_dt": VECTOR,
        "A_log": VECTOR,
        "A_imag": VECTOR,
        "B": VECTOR,
        "C": VECTOR,
        "D": VECTOR,
        "out_proj.weight": MATRIX,
        "out_proj.bias": VECTOR,
    },
    "rnn": RECURRENT,
    "gru": RECURRENT,
    "lstm": RECURRENT,
}


def build(pattern: Any, **model: Any) -> Model:
    return Model(load_config({"model": {"d_model": 32, "pattern": pattern, "vocab_size": 30, **model}}).model)


@pytest.mark.parametrize("kind", kinds())
def test_the_group_of_every_parameter(kind: str) -> None:
    model = build(kind, mlp="none")
    prefix = "blocks.0.mixer."
    for optimizer, matrix in (("muon", "muon"), ("adamw", "matrix")):
        groups = parameter_groups(model, optimizer)
        mixer = {n.removeprefix(prefix): group for n, group in groups.items() if n.startswith(prefix)}
        if kind in GROUPS:
            wanted = {name: matrix if group == MATRIX else group for name, group in GROUPS[kind].items()}
            assert mixer == wanted
        assert mixer and set(mixer.values()) <= {matrix, VECTOR}
        around = {n: group for n, group in groups.items() if not n.startswith(prefix)}
        assert around == {
            "embedding.tokens.weight": "embedding",
            "blocks.0.norm1.weight": VECTOR,
            "final_norm.weight": VECTOR,
        }


def test_the_groups_of_all_else() -> None:
    head = {"tie": False, "bias": True, "transform": "gelu"}
    embedding = {"position": "learned", "token_types": 2, "norm": "layer"}
    residual = {"kind": "scaled", "embedded": True}
    model = build("T", head=head, embedding=embedding, residual=residual, mlp={"kind": "gelu", "bias": True})
    groups = parameter_groups(model, "muon")
    others = {n: g for n, g in groups.items() if ".mixer." not in n}
    matrices = {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.transform.weight"}
    tables = {"tokens", "positions", "types"}
    embeddings = {f"embedding.{table}.weight" for table in tables} | {"head.unembedding.weight"}
    assert {n for n, g in others.items() if g == "muon"} == matrices
    assert {n for n, g in others.items() if g == "embedding"} == embeddings
    assert {n for n, g in others.items() if g == "vector"} == set(others) - matrices - embeddings
    assert {"blocks.0.input_mix.scale", "blocks.0.mlp.fc1.bias", "embedding.norm.bias"} < set(others)


def filled(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_it_steps_as_torchs_own() -> None:
    """Muon for matrices, AdamW for the rest, decay on matrices only, one learning rate for both, another for tables."""
    config = TrainingConfig(optimizer="muon", lr=1e-2, embedding_lr=3e-2, weight_decay=0.2)
    ours, theirs = build("mamba2 T"), build("mamba2 T")
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, config)
    by_group: dict[str, list[nn.Parameter]] = {}
    for name, group in parameter_groups(theirs, "muon").items():
        by_group.setdefault(group, []).append(theirs.get_parameter(name))
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    reference: list[torch.optim.Optimizer] = [
        torch.optim.Muon(by_group["muon"], lr=5e-3, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(by_group["vector"], lr=5e-3, **adamw),
        torch.optim.AdamW(by_group["embedding"], lr=1.5e-2, **adamw),
    ]
    for seed in range(3):
        torch.manual_seed(seed)
        filled(ours)
        torch.manual_seed(seed)
        filled(theirs)
        optimizer.set_lr(0.5)
        optimizer.step()
        for part in reference:
            part.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
    optimizer.zero_grad()
    assert not optimizer.gradients()


def test_the_state_is_by_name_and_zero_before_the_first_step() -> None:
    config = TrainingConfig(optimizer="muon", lr=1e-2)
    early, late = build("mamba2"), build("mamba2")
    late.load_state_dict(early.state_dict())
    asked, unasked = Optimizer(early, config), Optimizer(late, config)
    names = set(asked.state())
    assert "momentum_buffer.blocks.0.mixer.in_proj.weight" in names
    assert {"step.blocks.0.mixer.A_log", "exp_avg.final_norm.weight"} < names
    for model, optimizer in ((early, asked), (late, unasked)):
        torch.manual_seed(0)
        filled(model)
        optimizer.set_lr(1.0)
        optimizer.step()
    assert set(unasked.state()) == names
    assert all(torch.equal(value, unasked.state()[name]) for name, value in asked.state().items())
    assert all(map(torch.equal, early.parameters(), late.parameters()))


def test_it_says_what_it_does() -> None:
    text = ", ".join(Optimizer(build("mamba2"), TrainingConfig(optimizer="muon")).describe())
    assert "(Muon, decay)" in text and "embedding 960 in 1 (AdamW, no decay)" in text
