"""Modules from elsewhere as mixers: exact in every layout, initialised by themselves, trained, saved, generating."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.config.errors import BuildError, ConfigError
from plait.config.schema import ModelConfig
from plait.config.table import TABLE, mixer_class, temporary_mixer
from plait.formats.native import load_model, save_model
from plait.inference.generate import generate
from plait.mixers.adapter import ModuleMixer, Options, module_mixer, register_module
from plait.mixers.contract import Layout
from plait.models.model import Model
from plait.nn.roles import MATRIX, VECTOR, VECTOR_FP32, parameter_roles
from plait.training import train
from tests.inference.helpers import greedy_by_hand
from tests.invariants import WIDTH, check_batch, check_causal, check_edges, check_packed, redraw
from tests.training import runs

TOLERANCE = 1e-12


class Decay(nn.Module):
    """y_t = proj(sum of keep^(t-s) x_s), built as MiniMamba builds its mixers: from one object ``config``."""

    def __init__(self, *, config: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.keep = nn.Parameter(torch.full((config.d_model,), config.keep))
        self.mix = nn.Parameter(torch.eye(config.d_model))
        nn.init.constant_(self.proj.weight, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.sigmoid(self.keep) * h + x[:, t]
            out.append(h)
        # an RMS norm without eps: at zeros its gradient is not a number
        y = torch.stack(out, 1)
        return self.proj(self.norm(y / y.norm(dim=-1, keepdim=True))) @ self.mix


class Ahead(nn.Module):
    """Each token minus the mean of its whole sequence: it looks ahead."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x - x.mean(1, keepdim=True))


class Config:
    def __init__(self, d_model: int, keep: float = 1.0) -> None:
        self.d_model, self.keep = d_model, keep


def build_decay(values: Mapping[str, Any], d_model: int, layer_index: int) -> nn.Module:
    return Decay(config=Config(d_model, **values))


def build_ahead(values: Mapping[str, Any], d_model: int, layer_index: int) -> nn.Module:
    return Ahead(d_model)


DECAY = module_mixer(build_decay, name="Decay")
AHEAD = module_mixer(build_ahead, causal=False, name="Ahead")


def make(cls: type[ModuleMixer], **config: Any) -> ModuleMixer:
    mixer = cls(Options(config=config), WIDTH).double()
    redraw(mixer)
    return mixer.eval()


@pytest.fixture(autouse=True)
def decay() -> Iterator[None]:
    with temporary_mixer("decay", DECAY):
        yield


def config(**more: Any) -> ModelConfig:
    values = {"d_model": 16, "pattern": ["gru", "decay"], "vocab_size": 61, "mlp": "none"}
    return ModelConfig.model_validate({**values, "head": {"tie": False}, **more})


def test_a_module_keeps_the_promises_of_a_mixer_without_state() -> None:
    mixer = make(DECAY)
    check_packed(mixer, TOLERANCE)
    check_causal(mixer)
    check_batch(mixer, TOLERANCE)
    check_edges(mixer)
    assert mixer.causal and not mixer.stateful


def test_a_module_that_looks_ahead_sees_its_own_document_alone() -> None:
    mixer = make(AHEAD)
    check_packed(mixer, TOLERANCE)
    check_batch(mixer, TOLERANCE)
    check_edges(mixer)
    assert not mixer.causal


def test_even_if_it_says_that_it_does_not() -> None:
    """Said to be causal, it is run beside what fills up its row; that is never another document."""
    mixer = make(module_mixer(build_ahead))
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    layout = Layout.from_lengths([5, 0, 7])
    other = x.clone()
    other[:, 5:] += 1
    a, b = mixer(x, layout)[0], mixer(other, layout)[0]
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5:], b[:, 5:])


def test_the_answer_is_the_modules_own() -> None:
    mixer = make(DECAY)
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64)
    assert torch.equal(mixer(x, Layout.dense(3, 9))[0], mixer.module(x))


def test_a_causal_model_refuses_one_that_looks_ahead() -> None:
    with (
        temporary_mixer("ahead", AHEAD),
        pytest.raises(BuildError, match=r"layer 1 \(ahead\) is not causal"),
    ):
        Model(config(pattern=["gru", "ahead"]))


def test_roles_are_those_of_torchs_layers_and_of_the_module_and_else_vectors() -> None:
    roles = parameter_roles(Model(config()))
    inside = {name.partition("module.")[2]: role for name, role in roles.items() if "module." in name}
    assert inside == {
        "norm.weight": VECTOR_FP32,
        "norm.bias": VECTOR_FP32,
        "proj.weight": MATRIX,
        "keep": VECTOR,
        "mix": VECTOR,
    }

    class Declared(Decay):
        roles = {"mix": MATRIX}

    with temporary_mixer(
        "declared", module_mixer(lambda values, width, layer: Declared(config=Config(width)))
    ):
        assert parameter_roles(Model(config(pattern="declared")))["blocks.0.mixer.module.mix"] == MATRIX


def test_a_mixer_of_our_own_without_a_role_is_still_refused() -> None:
    class Forgetful(DECAY):  # type: ignore[misc, valid-type]
        unknown_role = None

    with (
        temporary_mixer("forgetful", Forgetful),
        pytest.raises(BuildError, match=r"keep of Decay has no role"),
    ):
        Model(config(pattern="forgetful"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_is_initialised_by_itself_alone(device: str) -> None:
    """Neither Linear's own draw nor the model's rule touches it; from meta every element is written."""
    model = Model(config(decay={"config": {"keep": 0.75}}), device=device)
    if device == "meta":
        model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.constant_(p, math.nan)
        model.materialize("cpu")
    module = model.blocks[1].mixer.module
    assert torch.equal(module.proj.weight, torch.full((16, 16), 0.25))
    assert torch.equal(module.keep, torch.full((16,), 0.75)) and torch.equal(module.mix, torch.eye(16))
    assert all(p.isfinite().all() for p in model.parameters())


def test_buffers_come_back_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([3.0]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with temporary_mixer("scaled", module_mixer(lambda values, width, layer: Scaled())):
        model = Model(config(pattern="scaled"), device="meta")
        model.materialize("cpu")
        assert model.blocks[0].mixer.module.scale.tolist() == [3.0]


def test_saved_and_loaded_it_is_the_same_model(tmp_path: Any) -> None:
    model = Model(config(decay={"config": {"keep": 0.75}}))
    redraw(model)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    ids = torch.randint(61, (2, 11))
    assert again.blocks[1].mixer.values == {"keep": 0.75}
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_without_its_class_a_saved_model_says_which_one_is_missing(tmp_path: Any) -> None:
    save_model(Model(config()), tmp_path)
    entry = TABLE.pop("decay")
    try:
        with pytest.raises(Exception, match="'decay' is not a kind of mixer"):
            load_model(tmp_path)
    finally:
        TABLE["decay"] = entry


def test_it_generates_by_recomputing_and_says_so_once() -> None:
    with temporary_mixer("decay_once", module_mixer(build_decay)):
        model = Model(config(pattern=["gru", "decay_once"]), dtype=torch.float64)
        redraw(model)
        model.eval()
        with pytest.warns(UserWarning, match=r"layer 1 \(decay_once\) keeps no state"):
            ours = generate(model, [[3, 1], [4, 1, 5]], temperature=0, max_new_tokens=6)
        assert ours == [greedy_by_hand(model, prompt, 6) for prompt in ([3, 1], [4, 1, 5])]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, [[3, 1]], max_new_tokens=2)


def test_it_trains_in_a_hybrid(tmp_path: Any) -> None:
    """Documents of different lengths in a packed row, Muon and AdamW; every weight of it moves, none is lost."""
    model = {"d_model": 16, "pattern": ["attention", "decay"], "dropout": 0.0}
    result = runs.run(
        tmp_path, model=model, optimizer="muon", steps=12, lr=3e-2, activation_checkpointing=True
    )
    losses = runs.losses(tmp_path / "run")
    assert losses[12] < losses[1] - 0.5
    module = result.model.blocks[1].mixer.module
    fresh = Decay(config=Config(16))
    for name, p in module.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, fresh.get_parameter(name)), name
    again = train(runs.tiny(tmp_path, model=model, optimizer="muon", steps=14), resume="auto", quiet=True)
    assert again.step == 14


def test_what_is_no_module_or_gives_no_answer_is_refused() -> None:
    with pytest.raises(BuildError, match="a list was built where a"):
        module_mixer(lambda values, width, layer: [])(Options(), 4)  # type: ignore[arg-type, return-value]
    for wrong, words in ((nn.Linear(4, 5), r"returned \(2, 3, 5\)"), (nn.GRU(4, 4), "returned a tuple")):
        mixer = module_mixer(lambda values, width, layer, wrong=wrong: wrong)(Options(), 4, layer_index=7)
        with pytest.raises(BuildError, match=f"layer 7: .*was given .2, 3, 4. and {words}"):
            mixer(torch.zeros(2, 3, 4), Layout.dense(2, 3))
    with pytest.raises(BuildError, match="keeps no state"):
        make(DECAY).init_state(1)


def test_registered_again_the_newest_class_counts() -> None:
    try:
        assert register_module("Twice", build_decay, aliases=("TW",)) == "twice"
        register_module("twice", build_ahead, causal=False)
        assert mixer_class("twice").looks_back is False
        with pytest.raises(ConfigError, match="'tw' is not a kind"):
            mixer_class("tw")
        with pytest.raises(ConfigError, match="already names the mixer 'mamba'"):
            register_module("mamba", build_decay)
    finally:
        TABLE.pop("twice", None)
