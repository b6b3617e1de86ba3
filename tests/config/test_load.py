from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from plait.config.errors import ConfigError
from plait.config.load import config_yaml, load_config, save_config

RUN: dict[str, Any] = {
    "experiment_name": "run",
    "model": {"d_model": 64, "pattern": "F*2 O", "fake": {"d_state": 8}},
    "training": {"lr": 1e-4},
}
YAML = """\
experiment_name: run
model:
  d_model: 64
  pattern: "F*2 O"
  F: {d_state: 8}
training:
  lr: 1e-4
"""
PYTHON = '''\
"""A run."""
_width = 8 * 8
experiment_name: str = "r" + "un"
model = {"d_model": _width, "pattern": ["F"] * 2 + ["O"], "fake": {"d_state": 2**3}}
model = {**model, "pattern": "F*2 O"}
training = {"lr": 1e-4}
'''


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_four_doors_to_one_config(tmp_path: Path) -> None:
    config = load_config(RUN)
    assert load_config(write(tmp_path, "a.yaml", YAML)) == config
    assert load_config(str(write(tmp_path, "a.json", json.dumps(RUN)))) == config
    assert load_config(write(tmp_path, "a.py", PYTHON)) == config
    overrides = [
        "--experiment-name=run",
        "--model.d-model",
        "64",
        "--model.pattern=F*2 O",
        "--model.F.d-state=8",
    ]
    assert load_config(None, [*overrides, "--training.lr 1e-4"]) == config
    assert load_config(config) == config


def test_a_saved_config_is_equal_and_saves_the_same_text(tmp_path: Path) -> None:
    config = load_config(RUN)
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert config_yaml(again) == (tmp_path / "config.yaml").read_text()
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "a.yaml", "# nothing\n"), ["--model.pattern=F"]).training.steps == 1000


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "model:\n  d_model: 64\n bad\n", r"a\.yaml line [34]: not valid YAML"),
        (
            "a.yaml",
            "model: {pattern: F}\nmodel: {}\n",
            r"a\.yaml line 2: not valid YAML: the key 'model' is given twice",
        ),
        ("a.yaml", "training: !!python/object/apply:os.getcwd []", r"a\.yaml line 1: not valid YAML"),
        ("a.yaml", "- 1\n- 2\n", r"a\.yaml: a config is a mapping of sections; this is a list"),
        ("a.yaml", "? {a: 1}\n: 2\n", r"a\.yaml line 1: not valid YAML"),
        ("a.yaml", "model: {pattern: F}\ntraining: {lr: fast}", r"a\.yaml: training\.lr: expected a number"),
        ("a.yaml", "\x00", r"a\.yaml: not valid YAML"),
        ("a.json", '{"model": {\n "d_model": 64,}}', r"a\.json line 2: not valid JSON"),
        ("a.json", '{"a": 1, "a": 2}', r"a\.json: the key 'a' is given twice"),
        ("a.json", "[" * 100_000, r"a\.json"),
        ("a.toml", "", r"a\.toml: a config ends with one of .yaml, .yml, .json, .py"),
        ("a.py", "model = ", r"a\.py line 1: not valid Python"),
        ("a.py", "x = 1\nimport os", r"a\.py line 2: a config holds only assignments.*'import os'"),
        ("a.py", "x = __import__('os').getcwd()", r"a\.py line 1: .*nothing is executed"),
        ("a.py", "x = [i for i in (1, 2)]", "nothing is executed"),
        (
            "a.py",
            "_width = 1\ny = _widht",
            r"the name '_widht' is not assigned above \(did you mean '_width'",
        ),
        ("a.py", "x = 9**9**9", "too large|not a number a config"),
        ("a.py", "x = 'a' * 10**9", "the most is 100000"),
        ("a.py", "_a = 'a' * 60000\nx = _a + _a", "the most is 100000"),
        ("a.py", "x = 1 / 0", "division by zero"),
        ("a.py", "x = (-8)**0.5", "not a number a config may hold"),
        ("a.py", "x = 'a' + 1", r"\+ of str and int"),
        ("a.py", "x = {1: 2}", "keys are strings"),
        ("a.py", "x.y = 1", "only assignments"),
        ("a.py", "modle = {}", r"a\.py: modle: unknown key.*did you mean 'model'"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_name(tmp_path: Path, name: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "hybrid.yaml", "")
    (tmp_path / "latin.yaml").write_bytes(b"experiment_name: caf\xe9")
    for source, expected in (
        (tmp_path / "hybird.yaml", "there is no such file (did you mean 'hybrid.yaml'?)"),
        (tmp_path / "nowhere" / "a.yaml", "there is no such file"),
        (str(tmp_path), "is a folder"),
        (tmp_path / "latin.yaml", "not UTF-8 text"),
        ("tinny", "'tinny' is not a recipe; there are"),
        (7, "a config is a path, a name, a mapping or a Config; got a int"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            load_config(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["--training.lr=1e-3"], "training.lr", 1e-3),
        (["--training.lr", "1e-3"], "training.lr", 1e-3),
        (["--training.lr 1e-3"], "training.lr", 1e-3),
        (["training.lr=1e-3"], "training.lr", 1e-3),
        (["--", "--training.batch-tokens=1024"], "training.batch_tokens", 1024),
        (["--training.lr=1", "--training.lr=2"], "training.lr", 2),
        (["--training.min-lr-ratio", "0"], "training.min_lr_ratio", 0),
        (["--training.betas=[0.8, 0.9]"], "training.betas", (0.8, 0.9)),
        (["--training.minutes=null"], "training.minutes", None),
        (["--training.compile", "--training.seed=3"], "training.compile", True),
        (["--data.train=a: b #c"], "data.train", "a: b #c"),
        (["--data.train=[a, b]"], "data.train", ["a", "b"]),
        (["--data.train=a=b"], "data.train", "a=b"),
        (["--experiment-name=1"], "experiment_name", "1"),
        (["--training.out=null"], "training.out", None),
        (["--model.norm=layer", "--model.norm.eps=1e-3"], "model.norm.kind", "layer"),
        (["--model.norm=layer", "--model.norm.eps=1e-3"], "model.norm.eps", 1e-3),
        (["--model.block-pattern=O"], "model.pattern", "O"),
        (
            ["--model.pattern=[O, {mixer: F, d_state: 2}]"],
            "model.pattern",
            ["O", {"mixer": "F", "d_state": 2}],
        ),
        (["--model.fake.norm.eps=1e-3"], "model.sections", {"fake": {"d_state": 8, "norm": {"eps": 1e-3}}}),
        (["--model.F.d-state=9"], "model.sections", {"fake": {"d_state": 9}}),
        (["--model.F.mlp=none", "--model.faux={rate: 1}"], "model.sections", {"fake": {"rate": 1}}),
        (
            ["--model.F.mlp=none", "--model.faux.mlp.width=3"],
            "model.sections",
            {"fake": {"d_state": 8, "mlp": {"kind": "none", "width": 3}}},
        ),
    ],
)
def test_overrides(overrides: list[str], path: str, value: Any) -> None:
    found: Any = load_config(RUN, overrides)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("before", [{"epochs": 3}, {"tokens_per_parameter": 20}, {"flops": 1e15}])
@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("--training.steps=7", {"steps": 7}),
        ("--training.epochs=2", {"epochs": 2}),
        ("--training.tokens-per-parameter=4", {"tokens_per_parameter": 4}),
        ("--training.flops=1e9", {"flops": 1e9}),
    ],
)
def test_the_length_that_is_asked_for_last_counts(
    before: dict[str, Any], override: str, kept: dict[str, Any]
) -> None:
    """What a file says must not overrule the command line silently."""
    training = load_config({"training": {"steps": 5, **before}}, [override]).training
    lengths = {"steps": 5, "epochs": None, "tokens_per_parameter": None, "flops": None, **kept}
    assert {name: getattr(training, name) for name in lengths} == lengths
    others = ["--training.checkpoint_schedule.steps=[1]", "--training.minutes=3", "--training.epochs=null"]
    training = load_config({"training": {"steps": 5, "flops": 1e15}}, others).training
    assert (training.steps, training.flops, training.minutes) == (5, 1e15, 3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--training.lrr=1"], "--training.lrr: the config has no such key (did you mean 'training.lr'?)"),
        (["--lr=1"], "--lr: the config has no such key (did you mean 'training.lr'?)"),
        (["--trainning.lr=1"], "--trainning.lr: the config has no such key (did you mean 'training.lr'?)"),
        (["--model.fakee.d_state=1"], "--model.fakee.d_state: the config has no such key"),
        (["--quux=1"], "--quux: the config has no such key; sections: experiment_name, model"),
        (["--training.lr.x=1"], "--training.lr.x: training.lr is a value and has no keys below it"),
        (["--model.fake.dropout.x=1"], "--model.fake.dropout.x: model.fake.dropout is a value"),
        (["--model.fake.norm.epz=1"], "--model.fake.norm.epz: unknown key; allowed: kind, place, eps"),
        (["--training.lr"], "--training.lr: a value must follow"),
        (["training.lr", "3"], "'training.lr' is not an override; the form is --section.key=value"),
        (["--training.betas=[1"], "--training.betas line 1: not valid YAML"),
        (["--training.lr=fast"], "training.lr: expected a number greater than 0; got 'fast'"),
        (["--model.fake.d_stat=1"], "model.fake.d_stat: unknown key; allowed: d_state"),
        (["--model.norm=3", "--model.norm.eps=1"], "--model.norm.eps: expected a mapping"),
        (["--training=3", "--training.lr=1"], "--training.lr: expected a mapping"),
    ],
)
def test_wrong_overrides(tmp_path: Path, overrides: list[str], expected: str) -> None:
    for source in (RUN, write(tmp_path, "a.yaml", YAML)):
        with pytest.raises(ConfigError) as caught:
            load_config(source, overrides)
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)


def test_the_source_is_left_as_it_was() -> None:
    before = json.dumps(RUN)
    load_config(RUN, ["--model.fake.d_state=3", "--training.lr=1"])
    assert json.dumps(RUN) == before
