"""The linear section: shorthands, who overrides whom, and options of a kind that is not there."""

from __future__ import annotations

import pytest

from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.schema import LinearConfig, ModelConfig

TERNARY = LinearConfig(kind="ternary")


def test_shorthands() -> None:
    assert ModelConfig(linear="ternary").linear == TERNARY
    assert ModelConfig(linear=None).linear == ModelConfig().linear == LinearConfig(kind="dense")
    assert load_config(
        {"model": {}}, ["--model.linear=ternary", "--model.linear.ste=clipped"]
    ).model.linear == (TERNARY.replace(ste="clipped"))


def test_a_layers_maps_are_its_entrys_then_its_kinds_then_the_models() -> None:
    model = ModelConfig.model_validate(
        {
            "linear": {"kind": "ternary", "ste": "clipped"},
            "attention": {"linear": {"scale": "row"}},
            "pattern": [
                "mamba",
                "T",
                {"mixer": "T", "linear": {"activations": "none"}},
                {"mixer": "M", "linear": "dense"},
            ],
        }
    )
    mamba, kind, entry, dense = (layer.block.linear for layer in model.layers())
    assert mamba == TERNARY.replace(ste="clipped")
    assert kind == TERNARY.replace(ste="clipped", scale="row")
    assert entry == TERNARY.replace(ste="clipped", scale="row", activations="none")
    assert dense == LinearConfig()  # another kind: what was said about ternary maps is dropped
    assert ModelConfig(**model.model_dump()) == model


def test_an_mlp_may_have_maps_of_its_own() -> None:
    model = ModelConfig.model_validate(
        {"linear": "ternary", "mlp": {"linear": "dense"}, "attention": {"mlp": "relu2"}, "pattern": "T M"}
    )
    attention, mamba = (layer.block.mlp for layer in model.layers())
    assert attention.kind == "relu2" and mamba.kind == "swiglu"
    assert attention.linear == mamba.linear == LinearConfig()  # not of a kind of MLP
    assert ModelConfig(linear="ternary").mlp.linear is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tenary", "linear.kind: expected one of dense, ternary; got 'tenary' (did you mean 'ternary'?)"),
        ({"ste": "clipped"}, "linear.ste: ste is an option of ternary maps; set kind: ternary"),
        (
            {"kind": "ternary", "scale": "columns"},
            "linear.scale: expected one of part, matrix, row; got 'columns'",
        ),
        ({"kind": "ternary", "bits": 2}, "linear.bits"),
    ],
)
def test_errors(given: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.model_validate({"linear": given})
    assert expected in str(error.value)
