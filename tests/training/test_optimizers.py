"""Every parameter of every kind of mixer is in the right group, and the optimizers are torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plait.config.errors import ConfigError, TrainingError
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
    embeddings = {f"embedding.{table}.weight" for table in tables}
    assert {n for n, g in others.items() if g == "muon"} == matrices
    assert {n for n, g in others.items() if g == "embedding"} == embeddings
    assert {n for n, g in others.items() if g == "unembedding"} == {"head.unembedding.weight"}
    rest = set(others) - matrices - embeddings - {"head.unembedding.weight"}
    assert {n for n, g in others.items() if g == "vector"} == rest
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


def peaks(model: Model, **training: Any) -> dict[str, tuple[float, float, bool]]:
    """Parameter name to peak rate, decay and whether by Muon, as the optimizers themselves have them."""
    optimizer = Optimizer(model, TrainingConfig.model_validate(training))
    names = {id(parameter): name for name, parameter in optimizer.named.items()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"], type(part).__name__ == "Muon")
        for part in optimizer.parts
        for group in part.param_groups
        for p in group["params"]
    }


def test_each_role_has_its_rate() -> None:
    model = build("mamba2 T", head={"tie": False}, mlp="none")
    rates = {"lr": 1e-3, "muon_lr": 2e-2, "embedding_lr": 0.3, "unembedding_lr": 4e-3, "weight_decay": 0.1}
    found = peaks(model, optimizer="muon", muon={"weight_decay": 0.2}, **rates)
    assert found["blocks.1.mixer.in_proj.weight"] == (2e-2, 0.2, True)
    assert found["blocks.0.mixer.A_log"] == found["final_norm.weight"] == (1e-3, 0.0, False)
    assert found["embedding.tokens.weight"] == (0.3, 0.0, False)
    assert found["head.unembedding.weight"] == (4e-3, 0.0, False)
    found = peaks(model, embedding_lr_width=128, **rates)
    assert found["blocks.1.mixer.in_proj.weight"] == (1e-3, 0.1, False)
    assert found["embedding.tokens.weight"][0] == pytest.approx(0.3 * 2), "d_model is 32, a quarter of 128"
    assert found["head.unembedding.weight"][0] == pytest.approx(8e-3)
    del rates["unembedding_lr"]
    assert peaks(model, **rates)["head.unembedding.weight"][0] == 0.3
    tied = peaks(build("T", mlp="none"), unembedding_lr=9.0, **rates)
    assert tied["embedding.tokens.weight"][0] == 0.3, "a tied table is an embedding"


def test_patterns_give_parameters_what_they_have_of_their_own() -> None:
    model = build("mamba2 T", residual={"kind": "scaled", "embedded": True}, mlp="none")
    groups = {
        "blocks.0.*.scale": {"lr": 0.5},
        "*.scale": {"lr": 0.25, "betas": [0.96, 0.9], "eps": 1e-10, "weight_decay": 0.05},
        "*.out_proj.weight": {"optimizer": "adamw"},
        "embedding.*": {"lr": 1.0, "weight_decay": 0.01},
    }
    options = {"optimizer": "muon", "lr": 1e-3, "muon_lr": 2e-2, "embedding_lr_width": 128, "groups": groups}
    found = peaks(model, **options)
    assert found["blocks.0.input_mix.scale"] == (0.5, 0.0, False), "the first pattern that matches"
    assert found["blocks.1.input_mix.scale"] == (0.25, 0.05, False)
    assert found["blocks.1.input_mix.share"] == (1e-3, 0.0, False)
    assert found["blocks.1.mixer.out_proj.weight"] == (1e-3, 0.1, False)
    assert found["blocks.1.mixer.in_proj.weight"] == (2e-2, 0.1, True)
    assert found["embedding.tokens.weight"] == (2.0, 0.01, False)
    optimizer = Optimizer(model, TrainingConfig.model_validate(options))
    own = [g for part in optimizer.parts for g in part.param_groups if g["peak"] == 0.25]
    assert [g["betas"] for g in own] == [(0.96, 0.9)] and own[0]["eps"] == 1e-10
    assert "*.scale 1 in 1 (AdamW, decay)" in optimizer.describe()
    assert peaks(model, groups={"*.in_proj.weight": {"optimizer": "muon"}})["blocks.1.mixer.in_proj.weight"][
        2
    ]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"*.scal": {"lr": 1}}, r"no parameter is left for '\*.scal'; there are embedding.tokens.weight"),
        ({"*": {"lr": 1}, "*.weight": {"lr": 2}}, r"no parameter is left for '\*.weight'"),
        (
            {"*.conv1d.weight": {"optimizer": "muon"}},
            r"Muon takes matrices, blocks.0.mixer.conv1d.weight has",
        ),
    ],
)
def test_patterns_that_do_nothing_or_cannot_be_are_refused(groups: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        peaks(build("mamba2"), groups=groups)


def test_what_is_wrong_in_a_pattern_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"^groups.\*.scale.lr: expected a number at least 0 or null; got -1"
    ):
        TrainingConfig.model_validate({"groups": {"*.scale": {"lr": -1}}})
    with pytest.raises(ConfigError, match=r"groups.\*.scale.betas.*each must be at least 0 and below 1"):
        TrainingConfig.model_validate({"groups": {"*.scale": {"betas": [0.9, 1.0]}}})
    with pytest.raises(ConfigError, match=r"groups.x.rate: unknown key; allowed: lr, betas"):
        TrainingConfig.model_validate({"groups": {"x": {"rate": 1}}})


def test_decay_and_momentum_can_be_set() -> None:
    groups = {"final_norm.weight": {"weight_decay": 0.3}}
    config = TrainingConfig.model_validate({"optimizer": "muon", "weight_decay": 0.2, "groups": groups})
    optimizer = Optimizer(build("T"), config)
    optimizer.set_decay(0.5)
    optimizer.set_momentum(0.7)
    decays = {g["weight_decay"] for part in optimizer.parts for g in part.param_groups}
    assert decays == {0.1, 0.0, 0.3}, "what a group says for itself is as it is said"
    assert [g["momentum"] for g in optimizer.parts[1].param_groups] == [0.7]


def test_it_says_what_it_does() -> None:
    text = ", ".join(Optimizer(build("mamba2"), TrainingConfig(optimizer="muon")).describe())
    assert "(Muon, decay)" in text and "embedding 960 in 1 (AdamW, no decay)" in text
