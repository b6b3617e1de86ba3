"""The schema outside of the model, and the rules all sections share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plait.config.errors import ConfigError, PlaitError, dotted, nearest
from plait.config.schema import Config, DataConfig, TokenizerConfig, TrainingConfig
from plait.config.section import Section


def all_sections(section: type[Section]) -> set[type[Section]]:
    inner = {found for name in section.model_fields if (found := section.subsection(name))}
    return {section}.union(*map(all_sections, inner))


def test_everything_has_a_default_and_a_description() -> None:
    for section in all_sections(Config):
        for name, field in section.model_fields.items():
            assert not field.is_required(), (section, name)
            assert field.description, (section, name)


def test_numbers_as_yaml_may_give_them() -> None:
    training = TrainingConfig(lr="1e-4", steps="2e3", batch_tokens=4096.0, betas=["0.9", 0.99], warmup="100")
    assert (training.lr, training.steps, training.batch_tokens) == (1e-4, 2000, 4096)
    assert training.betas == (0.9, 0.99) and training.warmup == 100


def test_paths_may_be_path_objects() -> None:
    data = DataConfig(train=[Path("a"), "b"], validation=Path("c"))
    assert (data.train, data.validation) == (["a", "b"], "c")


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        (TrainingConfig, {"lr": 0}, "lr: expected a number greater than 0; got 0"),
        (TrainingConfig, {"lr": "fast"}, "lr: expected a number greater than 0; got 'fast'"),
        (TrainingConfig, {"lr": float("inf")}, "lr: expected a number greater than 0; got inf"),
        (TrainingConfig, {"steps": True}, "steps: expected a whole number greater than 0; got true"),
        (TrainingConfig, {"steps": 1.5}, "steps: expected a whole number greater than 0; got 1.5"),
        (TrainingConfig, {"steps": "1.5"}, "steps: expected a whole number greater than 0; got '1.5'"),
        (TrainingConfig, {"steps": None}, "steps: expected a whole number greater than 0; got null"),
        (TrainingConfig, {"warmup": 1.5}, "warmup: expected a whole number of steps, or a share"),
        (TrainingConfig, {"warmup": -1}, "warmup: expected"),
        (TrainingConfig, {"betas": [0.9]}, "betas[1]: expected a list of 2 numbers; got [0.9]"),
        (TrainingConfig, {"betas": [0.9, 1.0]}, "betas: each must be"),
        (TrainingConfig, {"micro_batch_tokens": 10**9}, "micro_batch_tokens: expected at most batch_tokens"),
        (
            TrainingConfig,
            {"precision": "FP32"},
            "precision: expected one of auto, fp32, bf16, fp16; got 'FP32' (did you mean",
        ),
        (TrainingConfig, {"sample_prompts": "x"}, "sample_prompts: expected a list of strings; got 'x'"),
        (DataConfig, {"train": 3}, "train: expected a string or a list of strings or null; got 3"),
        (DataConfig, {"train": ["a", 3]}, "train"),
        (DataConfig, {"train": ""}, "train: expected a path"),
        (
            DataConfig,
            {"documents": "seperate"},
            "documents: expected one of separate, joined; got 'seperate' (did",
        ),
        (TokenizerConfig, {"typ": "bpe"}, "typ: unknown key; allowed: type, path"),
        (Config, {"experiment_name": "../up"}, "experiment_name: it names a folder"),
        (Config, {"experiment_name": ""}, "experiment_name: it names a folder"),
        (Config, {"model": {"pattern": "F"}, "trainning": {}}, "trainning: unknown key"),
        (Config, {"model": 3}, "model: expected a mapping of preset, d_model"),
        (Config, {"model": {"pattern": "F", "norm": {"epz": 1}}}, "model.norm.epz: unknown key"),
        (Config, {"model": {"pattern": "F", "fake": {"rate": 7}}}, "model.fake.rate: expected a number"),
        (Config, {"model": {"pattern": "F", 3: 4}}, "model.3: unknown key"),
        (Config, {"model": {"pattern": "F"}, "training": {3: 4}}, "training: keys are names; got 3"),
        (Config, {"model": {"pattern": "F"}, "training": [1]}, "training: expected a mapping of objective"),
    ],
)
def test_errors(section: type[Section], values: dict[Any, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section.model_validate(values)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)
    assert isinstance(caught.value, PlaitError) and isinstance(caught.value, ValueError)


def test_the_same_errors_from_the_constructor_and_from_json() -> None:
    for make in (lambda: TrainingConfig(lr=-1), lambda: TrainingConfig.model_validate_json('{"lr": -1}')):
        with pytest.raises(ConfigError, match=r"^lr: expected a number greater than 0; got -1"):
            make()


def test_nearest() -> None:
    assert nearest("Drop-Out", ["dropout", "norm"]) == " (did you mean 'dropout'?)"
    assert nearest("n-layer", ["n_layer"]) == " (did you mean 'n_layer'?)"
    assert nearest("zzz", ["dropout"]) == ""


def test_dotted() -> None:
    assert dotted(("model", "pattern", 2, "d_state")) == "model.pattern[2].d_state"
    assert str(ConfigError("wrong", ("a",)).below("b", 1)) == "b[1].a: wrong"
    assert str(ConfigError("wrong")) == "wrong"
