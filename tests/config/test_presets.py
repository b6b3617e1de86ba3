"""Every shipped preset and recipe resolves with the real mixers' options."""

from __future__ import annotations

import pytest

from plait.config.load import load_config
from plait.config.model import ModelConfig
from plait.config.recipes import preset_names, read_preset, read_recipe, recipe_names
from plait.config.schema import Config

NAMES = ["bert", "gpt2", "gru", "hybrid", "lstm", "mamba", "mamba2", "mamba3", "nanochat", "nanochat2026"]
NAMES = sorted([*NAMES, "bitbyte", "bitbyte-mamba", "minimamba", "rnn"])
LAYER_BY_LAYER = {"hybrid": 8, "nanochat2026": 12}  # presets whose pattern names every layer


def test_there_are_these_presets() -> None:
    assert preset_names() == NAMES
    assert "tiny" in recipe_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_resolves_and_says_everything_it_means(name: str) -> None:
    model = ModelConfig(preset=name)
    assert ModelConfig(**model.model_dump()) == model
    given = read_preset(name)
    assert len(model.layers()) == given.get("n_layer", len(model.layers()))
    if name not in recipe_names():  # of equal names the recipe is meant
        assert load_config(name).model == model
    for key in given:
        assert key in ModelConfig.model_fields or key in model.sections


@pytest.mark.parametrize("name", NAMES)
def test_only_the_number_of_layers_may_be_changed(name: str) -> None:
    if name in LAYER_BY_LAYER:
        with pytest.raises(
            ValueError, match=rf"n_layer is 3 but the pattern .* has {LAYER_BY_LAYER[name]} layers"
        ):
            ModelConfig(preset=name, n_layer=3)
    else:
        assert len(ModelConfig(preset=name, n_layer=3).layers()) == 3


def test_what_the_presets_are() -> None:
    gpt2, bert, nanochat = (ModelConfig(preset=name) for name in ("gpt2", "bert", "nanochat"))
    assert gpt2.layers()[0].options.model_dump() | {"n_head": 12, "rope": False, "bias": True} == (
        gpt2.layers()[0].options.model_dump()
    )
    assert gpt2.head.tie and gpt2.norm.kind == "layer" and gpt2.mlp.kind == "gelu_tanh" and gpt2.mlp.bias
    assert not bert.causal and bert.norm.place == "post" and bert.final_norm.kind == "none"
    assert bert.embedding.token_types == 2 and bert.head.transform == "gelu"
    assert nanochat.head.softcap == 15 and not nanochat.head.tie and not nanochat.norm.weight
    assert not nanochat.final_norm.weight and not nanochat.embedding.norm.weight
    for name in ("lstm", "gru", "rnn"):
        layer = ModelConfig(preset=name).layers()[0]
        assert (layer.kind, layer.block.residual.kind, layer.block.mlp.kind) == (name, "none", "none")


def test_of_equal_names_a_recipe_trains_the_preset() -> None:
    """``plait train NAME`` and ``--model.preset=NAME`` are never models of different kinds."""
    both = sorted(set(recipe_names()) & set(preset_names()))
    assert both == ["bitbyte", "bitbyte-mamba", "nanochat", "nanochat2026"]
    for name in both:
        given, trained, preset = read_recipe(name), load_config(name), ModelConfig(preset=name)
        assert given["model"]["preset"] == name == trained.experiment_name
        for part in ("norm", "final_norm", "mlp", "embedding", "head", "init", "linear", "causal"):
            assert getattr(trained.model, part) == getattr(preset, part), (name, part)
        assert {layer.kind for layer in trained.model.layers()} == {layer.kind for layer in preset.layers()}


def test_a_recipe_may_stand_on_another() -> None:
    ours, theirs = load_config("bitbyte"), load_config("bitbyte-mamba")
    assert (ours.tokenizer, ours.data, ours.training) == (theirs.tokenizer, theirs.data, theirs.training)
    assert theirs.training.precision == "fp16" and len(theirs.training.sequence_length_schedule) == 2
    assert {layer.kind for layer in ours.model.layers()} == {"attention"}
    assert {layer.kind for layer in theirs.model.layers()} == {"mamba"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_resolves(name: str) -> None:
    config = load_config(name)
    assert isinstance(config, Config)
    assert load_config(config.to_dict()) == config
