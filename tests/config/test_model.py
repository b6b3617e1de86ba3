from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from plait.config.block import BlockConfig, MLPConfig, NormConfig, ResidualConfig
from plait.config.errors import ConfigError
from plait.config.model import ModelConfig
from tests.config.fakes import Fake, FakeOptions


def error_of(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{"pattern": "F", **values})
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text
    return text


def test_a_layer_has_the_models_defaults_then_its_kinds_then_its_own() -> None:
    model = ModelConfig(
        pattern=["F", "O", {"mixer": "faux", "d_state": 8, "mlp": "relu2", "norm": "post"}],
        mlp="gelu",
        norm={"kind": "layer", "eps": 1e-6},
        dropout=0.1,
        F={"d_state": 32, "rate": "1e-2", "mlp": "none", "norm": {"eps": 1e-3}},
    )
    first, second, third = model.layers()
    assert (first.kind, second.kind, third.kind) == ("fake", "other", "fake")
    assert first.options == FakeOptions(d_state=32, rate=0.01)
    assert third.options == FakeOptions(d_state=8, rate=0.01)
    assert [layer.block.mlp.kind for layer in model.layers()] == ["none", "gelu", "relu2"]
    assert first.block.norm == NormConfig(kind="layer", eps=1e-3)
    assert second.block == BlockConfig(mlp="gelu", norm={"kind": "layer", "eps": 1e-6}, dropout=0.1)
    assert third.block.norm == NormConfig(kind="layer", eps=1e-3, place="post")
    assert third.block.dropout == 0.1


def test_a_section_whose_kind_changes_drops_what_belonged_to_the_old_one() -> None:
    model = ModelConfig(
        pattern="F O",
        norm={"kind": "layer", "bias": True, "place": "post"},
        mlp={"kind": "gelu", "bias": True, "width": 7},
        fake={"norm": "rms", "mlp": "swiglu"},
    )
    fake, other = model.layers()
    assert fake.block.norm == NormConfig(kind="rms", place="post")
    assert fake.block.mlp == MLPConfig(kind="swiglu")
    assert other.block.mlp == MLPConfig(kind="gelu", bias=True, width=7)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("layer", NormConfig(kind="layer")),
        ("post", NormConfig(place="post")),
        ("none", NormConfig(kind="none")),
        (None, NormConfig(kind="none")),
        ({"weight": False}, NormConfig(weight=False)),
    ],
)
def test_short_norms(value: Any, expected: NormConfig) -> None:
    assert ModelConfig(pattern="F", norm=value).norm == expected


@pytest.mark.parametrize(
    ("value", "kind"), [(True, "add"), ("yes", "add"), (False, "none"), ("no", "none"), ("scaled", "scaled")]
)
def test_short_residuals(value: Any, kind: str) -> None:
    assert ModelConfig(pattern="F", residual=value).residual == ResidualConfig(kind=kind)


def test_the_final_norm_is_that_of_the_blocks_unless_given() -> None:
    norm = {"kind": "layer", "eps": 1e-6, "place": "post"}
    assert ModelConfig(pattern="F", norm=norm).final_norm == NormConfig(kind="layer", eps=1e-6)
    assert ModelConfig(pattern="F", norm=NormConfig(**norm)).final_norm == NormConfig(kind="layer", eps=1e-6)
    assert ModelConfig(pattern="F", norm=norm, final_norm="none").final_norm.kind == "none"


def test_the_number_of_layers() -> None:
    assert len(ModelConfig(pattern="F*3 O").layers()) == 4
    assert len(ModelConfig(pattern="F*3 O", n_layer=4).layers()) == 4
    assert (
        len(ModelConfig(pattern="fake", n_layer=5).layers()) == 5
    )  # one name alone: as many as the model has
    assert ModelConfig(block_pattern=["F", "O"]).pattern == ["F", "O"]
    for pattern in ("F*3 O", ["F", "O", "F"], ["F"], "F*2"):
        text = error_of(pattern=pattern, n_layer=7)
        assert text.startswith("n_layer: n_layer is 7 but the pattern") and "must match" in text
    assert "has 4 layers" in error_of(pattern="F*3 O", n_layer=7)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"d_modle": 3}, ["d_modle: unknown key", "pad_vocab_size_multiple", "did you mean 'd_model'"]),
        ({"fak": {}}, ["fak: unknown key", "did you mean 'fake'"]),
        (
            {"fake": {"d_stat": 3}},
            ["fake.d_stat: unknown key; allowed: d_state, rate", "norm", "mean 'd_state'"],
        ),
        ({"fake": {"d_state": 0}}, ["fake.d_state: expected a whole number greater than 0; got 0"]),
        ({"fake": {"d_state": True}}, ["fake.d_state: expected a whole number", "got true"]),
        ({"fake": {"mode": "exat"}}, ["fake.mode: expected one of fast, exact", "did you mean 'exact'"]),
        ({"fake": {"rank": 0}}, ["fake.rank: expected one of auto or a whole number greater than 0; got 0"]),
        (
            {"fake": {"pairs": 3}},
            ["fake.pairs: expected a whole number greater than 0 and a multiple of 2; got 3"],
        ),
        ({"fake": {"mlp": "relu"}}, ["fake.mlp.kind: expected one of none, gelu", "did you mean 'relu2'"]),
        ({"fake": {"norm": 3}}, ["fake.norm: expected a mapping", "got 3"]),
        ({"fake": 3}, ["fake: expected a mapping", "got 3"]),
        ({"F": {}, "fake": {}}, ["fake: given twice, as 'F' and as 'fake'"]),
        ({"pattern": "F", "block_pattern": "F"}, ["pattern: given twice"]),
        ({"pattern": ["F", {"mixer": "F", "d_stat": 1}]}, ["pattern[1].d_stat: unknown key"]),
        ({"pattern": ["F", {"mixer": "F", "rate": 2}]}, ["pattern[1].rate: expected", "at most 1; got 2"]),
        ({"pattern": ["F", {"mixer": "F", "norm": {"epz": 1}}]}, ["pattern[1].norm.epz: unknown key"]),
        ({"pattern": "F Q"}, ["pattern: in 'F Q': 'Q' is not a kind of mixer; known: attention (T"]),
        ({"pattern": 3}, ["pattern: expected a string", "got 3"]),
        ({"n_layer": 0}, ["n_layer: expected a whole number greater than 0 or null; got 0"]),
        ({"d_model": "wide"}, ["d_model: expected a whole number", "got 'wide'"]),
        ({"dropout": 1}, ["dropout: expected a number at least 0 and less than 1; got 1"]),
        ({"norm": {"kind": "rms", "bias": True}}, ["norm.bias: an rms norm has no bias; use kind: layer"]),
        ({"head": "lmm"}, ["head.kind: expected one of lm", "did you mean 'lm'"]),
        ({"head": {"tie": "perhaps"}}, ["head.tie: expected true or false; got 'perhaps'"]),
        ({"preset": "gtp2"}, ["preset: 'gtp2' is not a preset; there are bert", "did you mean 'gpt2'"]),
        ({"preset": 2}, ["preset: expected the name of a preset; got 2"]),
        ({"residual": {"kind": "ad"}}, ["residual.kind: expected one of add, none, scaled"]),
        ({"vocab_size": float("nan")}, ["vocab_size: expected a whole number", "got nan"]),
    ],
)
def test_errors_name_the_place_the_allowed_and_the_nearest(
    values: dict[str, Any], expected: list[str]
) -> None:
    text = error_of(**values)
    assert text.startswith(expected[0]), text
    for part in expected:
        assert part in text, text


def test_the_options_of_a_kind_that_is_not_used_are_not_looked_at() -> None:
    from plait.config.table import temporary_mixer

    with temporary_mixer("absent", "tests.no_such_module:Absent"):
        assert ModelConfig(pattern="F", absent={"anything": 1}).sections == {"absent": {"anything": 1}}
        assert "absent: " in error_of(pattern="absent")


def test_a_config_is_equal_after_yaml_json_and_itself() -> None:
    model = ModelConfig(
        pattern=("F", {"mixer": "O", "n_head": 3, "norm": "post"}, "F*2"),
        fake={"limits": (0.0, float("inf")), "rate": 1e-3},
        norm="layer",
        residual=False,
        head={"kind": "classification", "num_labels": 1},
    )
    again = [
        ModelConfig(**model.model_dump()),
        ModelConfig.model_validate(model),
        ModelConfig.model_validate(yaml.safe_load(yaml.safe_dump(model.model_dump()))),
        ModelConfig.model_validate(json.loads(json.dumps(model.model_dump()))),
        ModelConfig.model_validate_json(model.model_dump_json()),
    ]
    for other in again:
        assert other == model
        assert other.layers() == model.layers()
    assert model.layers()[0].options == Fake.options_class(limits=(0, float("inf")), rate=1e-3)
    assert model != model.replace(d_model=8)


def test_replace_validates() -> None:
    model = ModelConfig(pattern="F", fake={"rate": 0.1})
    assert model.replace(vocab_size=300, norm="layer").vocab_size == 300
    assert model.replace(vocab_size=300).layers() == model.layers()
    with pytest.raises(ConfigError, match="vocab_size: expected"):
        model.replace(vocab_size=-1)
    with pytest.raises(ConfigError, match="d_model: a config is never changed"):
        model.d_model = 3  # type: ignore[misc]


class TestPresets:
    def test_values_are_laid_on_the_preset(self) -> None:
        model = ModelConfig(
            preset="gpt2", pattern="F*2", fake={"d_state": 3}, dropout=0.3, embedding={"dropout": 0}
        )
        assert len(model.layers()) == 2  # the preset's 12 layers belong to its own pattern
        assert (model.d_model, model.dropout) == (768, 0.3)
        assert (model.embedding.dropout, model.embedding.position) == (0, "learned")
        assert model.layers()[0].block.norm.kind == "layer"

    def test_a_head_of_another_kind_drops_the_presets(self) -> None:
        model = ModelConfig(preset="bert", pattern="F", head="classification")
        assert model.head.transform == "none" and not model.head.bias
        assert ModelConfig(preset="bert", pattern="F", head={"softcap": 9}).head.transform == "gelu"

    def test_a_kinds_section_is_merged_with_the_presets(self) -> None:
        model = ModelConfig(preset="gpt2", pattern="F", T={"n_head": 3})
        assert model.sections["attention"]["n_head"] == 3
        assert model.sections["attention"]["bias"] is True

    def test_a_resolved_preset_is_equal_to_itself(self) -> None:
        model = ModelConfig(preset="bert", pattern="F*2", norm={"eps": 1e-6}, mlp="relu2", n_layer=2)
        assert ModelConfig(**model.model_dump()) == model
        assert model.mlp == MLPConfig(kind="relu2")
        assert model.norm == NormConfig(kind="layer", place="post", eps=1e-6)
