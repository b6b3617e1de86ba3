"""``plait convert`` on every oracle: afterwards the folder is the model, and generates; or nothing is there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import plait
from plait.cli import convert as command
from plait.config.errors import CheckpointError
from plait.formats import convert as formats
from plait.tokenizers.characters import SPECIAL_TOKENS, CharactersTokenizer
from tests.cli.conftest import Run

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Oracle(NamedTuple):
    """What is converted, and what the converted model must compute, within the fixture's tolerance."""

    format: str
    source: Path
    config: dict[str, Any] | None
    data: Path
    wanted: str
    tolerance: float
    generates: bool = True


def bare(name: str, format: str, case: str, wanted: str, tolerance: float, **config: Any) -> Oracle:
    """A state dict of its own, whose configuration lies in oracle.json."""
    folder = FIXTURES / name
    told = json.loads((folder / "oracle.json").read_text())["cases"][case]["config"]
    source, data = folder / f"{case}_state_dict.safetensors", folder / f"{case}.safetensors"
    generates = not told.get("bidirectional") and case not in ("classification", "features")
    return Oracle(format, source, {**told, **config}, data, wanted, tolerance, generates)


def oracles() -> dict[str, Oracle]:
    found: dict[str, Oracle] = {}
    for case in ("lstm_uni", "lstm_bi", "gru_uni", "gru_bi", "rnn_uni", "rnn_bi"):
        found[case] = bare("foundry_rnn", "foundry", case, "logits", 1e-5)
    transformers = FIXTURES / "foundry_transformers"
    for family, wanted in (("gpt2", "logits"), ("bert", "logits_no_mask")):
        data = transformers / f"{family}_oracle.safetensors"
        found[family] = Oracle("foundry", transformers / family, None, data, wanted, 1e-4, family == "gpt2")
    for case in ("lm", "lm_untied_bias"):
        found[f"minimamba {case}"] = bare("minimamba", "minimamba", case, "logits", 5e-5)
    found["minimamba classification"] = bare(
        "minimamba", "minimamba", "classification", "logits_mean", 5e-5, pooling_strategy="mean"
    )
    for case in ("bitbytelm_mha", "bitbytelm_gqa", "mambamlm", "mambamlm_small_conv"):
        found[case] = bare("bitbyte", "bitbyte", case, "logits_act_off", 1e-4, act_quant=False)
    for state in ("oct2025", "jul2026"):
        folder = FIXTURES / f"nanochat_{state}"
        source = folder / "base_checkpoints" / "d4" / "model_000010.pt"
        found[f"nanochat {state}"] = Oracle(
            "nanochat", source, None, folder / "oracle.safetensors", "logits", 1e-4
        )
    return found


ORACLES = oracles()


def converted(plait_: Run, oracle: Oracle, folder: Path) -> Path:
    words: list[object] = ["convert", oracle.source, folder / "model", "--from", oracle.format]
    if oracle.config is not None:
        (folder / "config.json").write_text(json.dumps(oracle.config))
        words += ["--config", folder / "config.json"]
    if oracle.format != "bitbyte":  # whose ids are bytes; the others' models have no tokenizer of their own
        model, _ = formats.read_original(oracle.source, oracle.format, oracle.config)
        n_characters = model.vocab_size - len(SPECIAL_TOKENS)
        CharactersTokenizer("".join(map(chr, range(97, 97 + n_characters)))).save(folder / "tokenizer")
        words += ["--tokenizer", folder / "tokenizer"]
    ran = plait_(*words)
    assert ran.status == 0, ran
    assert ("plait generate" in ran.out) is oracle.generates
    return folder / "model"


def numbers(oracle: Oracle) -> dict[str, Tensor]:
    return load_file(oracle.data)


@pytest.mark.parametrize("name", list(ORACLES))
@torch.no_grad()
def test_every_oracle(name: str, plait: Run, tmp_path: Path) -> None:
    oracle = ORACLES[name]
    folder = converted(plait, oracle, tmp_path)
    model, data = load(folder), numbers(oracle)
    error = float((model(data["input_ids"]).logits - data[oracle.wanted]).abs().max())
    assert error <= oracle.tolerance, f"off by {error:.1e}"
    direct, _ = formats.read_original(oracle.source, oracle.format, oracle.config)
    assert torch.equal(model(data["input_ids"]).logits, direct(data["input_ids"]).logits)
    written = plait("generate", folder, "abba", "--max-new-tokens=3", "--temperature=0")
    if oracle.generates:
        assert written.status == 0, written
        assert "3 tokens in" in written.err
    else:
        assert written.status == 1 and written.error


def load(folder: Path) -> Any:
    return plait.load(folder)


@torch.no_grad()
def test_features(plait: Run, tmp_path: Path) -> None:
    oracle = bare("minimamba", "minimamba", "features", "features_from_ids", 2e-5)
    model, data = load(converted(plait, oracle, tmp_path)), numbers(oracle)
    assert model.config.head.kind == "features"
    for given, wanted in (
        ("input_ids", "features_from_ids"),
        ("input_embeddings", "features_from_embeddings"),
    ):
        name = "inputs_embeds" if given == "input_embeddings" else given
        error = float((model(**{name: data[given]}).hidden - data[wanted]).abs().max())
        assert error <= oracle.tolerance, f"{wanted}: off by {error:.1e}"


def test_the_command_knows_every_format() -> None:
    hints = get_type_hints(command.convert, include_extras=True)
    assert get_args(get_args(hints["format"])[0]) == tuple(formats.FORMATS)


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("missing", (), "there is no"),
        ("gru_uni_state_dict.safetensors", ("--config", "wrong.json"), "hidden_size"),
        ("gru_uni_state_dict.safetensors", ("--config", "none.json"), "none.json: there is no such file"),
        ("oracle.json", (), "no file of weights"),
        (
            "gru_uni_state_dict.safetensors",
            ("--tokenizer", "large"),
            "the tokenizer has 72 ids, the model only 60",
        ),
    ],
)
def test_a_mistake_leaves_nothing(
    source: str, more: tuple[str, ...], message: str, plait: Run, tmp_path: Path
) -> None:
    Path("wrong.json").write_text('{"hidden_size": 8}')
    CharactersTokenizer("".join(map(chr, range(33, 100)))).save("large")
    before = sorted(tmp_path.rglob("*"))
    path = FIXTURES / "foundry_rnn" / source
    ran = plait("convert", path, "model", "--from", "foundry", *more)
    assert ran.status == 1 and message in ran.error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_not_empty_stays(plait: Run, tmp_path: Path) -> None:
    source = FIXTURES / "foundry_rnn" / "gru_uni_state_dict.safetensors"
    Path("model").mkdir()
    assert (
        plait("convert", source, "model", "--from", "foundry").status == 0
    )  # an empty one is as good as none
    before = {path: path.read_bytes() for path in Path("model").iterdir()}
    ran = plait("convert", source, "model", "--from", "foundry")
    assert ran.status == 1 and "exists already" in ran.error
    assert {path: path.read_bytes() for path in Path("model").iterdir()} == before


def test_a_disk_that_refuses_leaves_nothing(
    plait: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CharactersTokenizer, "save", full)
    source = FIXTURES / "foundry_transformers" / "gpt2"
    with pytest.raises(CheckpointError, match="No space left"):
        formats.convert(source, tmp_path / "model", "foundry", tokenizer=CharactersTokenizer("ab"))
    assert list(tmp_path.iterdir()) == []


def test_without_a_tokenizer_it_says_so(plait: Run) -> None:
    source = FIXTURES / "foundry_rnn" / "gru_uni_state_dict.safetensors"
    ran = plait("convert", source, "model", "--from", "foundry")
    assert ran.status == 0 and "it has no tokenizer" in ran.out
    assert "has no tokenizer beside its weights" in plait("generate", "model", "a").error


def test_formats_are_suggested(plait: Run) -> None:
    ran = plait("convert", "x", "y", "--from", "nanochatt")
    assert ran.status == 2 and "nanochat" in ran.error
    with pytest.raises(CheckpointError, match="did you mean 'nanochat'"):
        formats.read_original("x", "nanochatt")
