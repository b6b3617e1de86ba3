"""Weights on disk: bit for bit, tied ones once, and nothing of another model."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.config.errors import CheckpointError
from plait.config.load import load_config
from plait.config.table import kinds
from plait.formats import native
from plait.formats.native import load_model, load_saved_tokenizer, save_model
from plait.models.model import Model
from plait.nn.roles import parameter_roles
from plait.tokenizers.bytes import BytesTokenizer


def build(pattern: Any = "mamba2 attention", **model: Any) -> Model:
    config = load_config({"model": {"d_model": 32, "pattern": pattern, "vocab_size": 61, **model}})
    return Model(config.model)


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    model = build(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training and loaded.config == model.config
    names = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(names[name].view(torch.int32), parameter.view(torch.int32)), name
    ids = torch.randint(61, (2, 20))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_weight_is_saved_once_and_stays_tied(tmp_path: Path, tie: bool) -> None:
    model = build(head={"tie": tie, "bias": True}, pad_vocab_size_multiple=16)
    save_model(model, tmp_path)
    assert ("head.unembedding.weight" in load_file(tmp_path / "model.safetensors")) == (not tie)
    loaded = load_model(tmp_path)
    assert (loaded.head.unembedding.weight is loaded.embedding.tokens.weight) == tie
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_cast_keeps_what_must_stay_wide(tmp_path: Path) -> None:
    model = build()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    roles = parameter_roles(loaded)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if roles[name].fp32 else torch.bfloat16), name
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, torch.bfloat16}
    save_model(loaded, tmp_path / "narrow")
    again = load_model(tmp_path / "narrow")
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in loaded.parameters()]
    assert all(map(torch.equal, again.parameters(), loaded.parameters()))


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    model = build()
    for name in ("a", "b"):
        save_model(model, tmp_path / name, BytesTokenizer())
    for file in ("model.safetensors", "config.json", "tokenizer/plait_tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tokenizer = load_saved_tokenizer(tmp_path / "a")
    assert load_model(tmp_path / "a").tokenizer.fingerprint() == BytesTokenizer().fingerprint()
    assert tokenizer is not None and tokenizer.fingerprint() == BytesTokenizer().fingerprint()
    save_model(model, tmp_path / "bare")
    assert load_saved_tokenizer(tmp_path / "bare") is None


def other(change: str, tensors: dict[str, torch.Tensor]) -> None:
    if change == "missing":
        del tensors["final_norm.weight"]
    elif change == "unknown":
        tensors["final_norm.bias"] = torch.zeros(32)
    elif change == "shape":
        tensors["final_norm.weight"] = torch.zeros(16)
    else:
        tensors["final_norm.weight"] = torch.zeros(32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "it has no tensor final_norm.weight"),
        ("unknown", "unknown tensor final_norm.bias"),
        ("shape", r"final_norm\.weight has shape \(16,\), this model's \(32,\)"),
        ("dtype", r"final_norm\.weight is torch\.int32"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, change: str, words: str) -> None:
    save_model(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    other(change, tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and "another model" in str(error.value)


def test_a_refused_file_changes_nothing(tmp_path: Path) -> None:
    save_model(build(), tmp_path)
    model = build("mamba2 attention", pad_vocab_size_multiple=64)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        CheckpointError, match=r"embedding\.tokens\.weight has shape \(61, 32\), this model's \(64, 32\)"
    ):
        native.load_weights(model, tmp_path)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"\x10\x00", "cannot be read"),
        ("model.safetensors", None, "cannot be read|holds no model"),
        ("config.json", None, r"config\.json cannot be read"),
        ("config.json", b"{", "is not JSON"),
        ("config.json", b'{"d_modle": 3}', "did you mean 'd_model'"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, file: str, content: bytes | None, words: str) -> None:
    save_model(build(), tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="holds no model: give a run"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder .*modle \(did you mean 'model'\?\)"):
        load_model(tmp_path / "modle")
    (tmp_path / "model" / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(tmp_path / "model")


def test_a_full_disk_while_saving_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    save_model(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot save the model to .*: No space left on device"):
        save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_public_name_loads(tmp_path: Path) -> None:
    model = build()
    save_model(model, tmp_path)
    assert all(map(torch.equal, plait.load(tmp_path).parameters(), model.parameters()))
    assert json.loads((tmp_path / "config.json").read_text())["d_model"] == 32
