"""`plait.build`, `plait.load`, `plait.train`: from values alone, without a file or a global."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import plait
from plait import api
from plait.config.schema import Config, ModelConfig
from plait.models.model import Model

SMALL = {"d_model": 16, "pattern": "M2 T", "mamba2": {"d_state": 8, "headdim": 8}, "attention": {"n_head": 2}}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def kinds(model: Model) -> list[str]:
    return [block.kind for block in model.blocks]


def test_the_public_names_are_these() -> None:
    assert plait.build is api.build
    assert plait.load is api.load
    assert plait.train is api.train


def test_build_from_any_description(tmp_path: Path) -> None:
    described = [
        SMALL,
        {"model": SMALL},
        {"model": SMALL, "data": {"sequence_length": 8}},
        ModelConfig(**SMALL),
        Config(model=SMALL),
    ]
    models = [plait.build(one) for one in described]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m.json").write_text(json.dumps({"model": SMALL}))
    models.append(plait.build("m.json"))
    models.append(plait.build(tmp_path / "m.json"))
    for model in models:
        assert kinds(model) == ["mamba2", "attention"] and model.config.d_model == 16
        assert model.training and model.vocab_size == model.tokenizer.vocab_size == 260
    assert kinds(plait.build("tiny", device="meta")) == ["mamba2", "attention", "mamba2"]


def test_overrides_replace_keys_of_the_model() -> None:
    for base in ("hybrid", SMALL, {"model": SMALL}, ModelConfig(**SMALL), Config(model=SMALL)):
        model = plait.build(
            base, d_model=32, pattern="gru lstm", mlp="none", norm={"kind": "layer"}, n_layer=None
        )
        assert kinds(model) == ["gru", "lstm"] and model.config.d_model == 32, base
        assert model.config.mlp.kind == "none" and model.config.norm.kind == "layer"
    assert plait.build("gpt2", n_layer=2, d_model=24, attention={"n_head": 3}).config.vocab_size == 50257
    assert (
        len(plait.build("gpt2", pattern="T rnn", d_model=24, attention={"n_head": 2}, device="meta").blocks)
        == 2
    )


def test_a_vocabulary_of_ones_own_comes_without_a_tokenizer() -> None:
    model = plait.build(SMALL, vocab_size=11)
    assert model.vocab_size == 11 and model.tokenizer is None
    loss = model(torch.arange(10).view(1, 10), labels=torch.arange(10).view(1, 10)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_a_built_model_writes_text_at_once() -> None:
    text = plait.build(SMALL).eval().generate("ab", max_new_tokens=4, seed=0)
    assert isinstance(text, str)


def test_device_and_dtype() -> None:
    meta = plait.build(SMALL, device="meta")
    assert all(p.device.type == "meta" for p in meta.parameters())
    assert plait.build(SMALL, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("describe", "said"),
    [
        (lambda: plait.build(SMALL, d_modle=4), "did you mean 'd_model'?"),
        (lambda: plait.build("hybrid", d_modle=4), "did you mean 'model.d_model'?"),
        (lambda: plait.build({"patern": "T"}), "did you mean 'pattern'?"),
        (lambda: plait.build({"model": {}, "trainin": {}}), "did you mean 'training'?"),
        (lambda: plait.build("hybird"), "hybrid"),
        (lambda: plait.build(3), "got a int"),
        (lambda: plait.build("hybrid", mlp=object()), "model.mlp: expected plain values"),
        (lambda: plait.build({"tokenizer": {"type": "bpe"}}), "trained first"),
        (lambda: plait.load("nowhere"), "there is no folder nowhere"),
        (lambda: plait.train({"data": {"train": "none.txt"}}, quiet=True), "none.txt"),
    ],
)
def test_mistakes_are_plait_errors(describe, said: str, tmp_path: Path) -> None:
    with pytest.raises(plait.PlaitError, match=None) as caught:
        describe()
    assert said in str(caught.value)


def test_train_then_load_then_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("abc def " * 100)
    config = {
        "model": {**SMALL, "mlp": "none"},
        "data": {"train": "text.txt", "sequence_length": 16, "cache": "cache", "validation_fraction": 0.2},
        "training": {"steps": 2, "batch_tokens": 32, "out": "run"},
    }
    result = plait.train(config, quiet=True)
    assert result.step == 2 and capsys.readouterr() == ("", "")
    model = plait.load("run")
    assert not model.training and model.tokenizer.vocab_size == 260
    trained = result.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert isinstance(model.generate("abc", max_new_tokens=3), str)
    assert plait.load(Path("run"), device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(plait.PlaitError, match="already holds a run"):
        plait.train(config, quiet=True)
    longer = {**config, "training": {**config["training"], "steps": 3}}
    assert plait.train(longer, resume="auto", quiet=True).step == 3
    assert plait.train(config, overwrite=True, quiet=True).step == 2
