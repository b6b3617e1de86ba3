"""nanochat's checkpoint_manager: its files, its rules for which one is meant, old ones and those of the hybrid."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.compat.nanochat.checkpoint_manager import (
    build_model,
    find_largest_model,
    find_last_step,
    load_checkpoint,
    load_model,
    load_model_from_dir,
    plait_folder,
    save_checkpoint,
)
from plait.compat.nanochat.gpt import GPT, GPTConfig
from plait.compat.nanochat.tokenizer import RustBPETokenizer
from plait.config.errors import CheckpointError, TokenizerError
from plait.formats.native import load_model as load_plait
from plait.tokenizers.nanochat import write_tokenizer
from tests.invariants import redraw

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXTS = ["a small text, and another small text", "one more"] * 3


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nanochat's folder with a tokenizer of 275 ids."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    RustBPETokenizer.train_from_iterator(TEXTS, 275).save(tmp_path / "tokenizer")
    return tmp_path


def make(pattern: Any, vocab_size: int = 275) -> GPT:
    torch.manual_seed(0)
    sizes = {"sequence_len": 32, "vocab_size": vocab_size, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(n_layer=2, block_pattern=pattern, **sizes))
    redraw(model)
    return model.eval()


def saved(model: GPT, folder: Path, step: int, meta: dict[str, Any] | None = None) -> None:
    optimizers = [part.state_dict() for part in model.setup_optimizers()]
    more = (
        {"step": step, "val_bpb": 1.5, "model_config": dict(model.config.__dict__)} if meta is None else meta
    )
    save_checkpoint(folder, step, model.state_dict(), optimizers, more)


@pytest.mark.parametrize("pattern", [None, ["T", "M"], ["M", "M"]])
def test_saved_and_built_it_is_the_same_model(base: Path, pattern: list[str] | None) -> None:
    model = make(pattern)
    folder = base / "base_checkpoints" / "d2"
    saved(model, folder, 30)
    assert sorted(os.listdir(folder)) == ["meta_000030.json", "model_000030.pt", "optim_000030.pt"]
    again, tokenizer, meta = build_model(folder, 30, "cpu", "eval")
    ids = torch.randint(275, (2, 9))
    assert torch.equal(again(ids), model(ids)) and again.config == model.config
    assert again.block_pattern == model.block_pattern == (pattern or ["T", "T"])
    assert meta["step"] == 30 and meta["model_config"]["block_pattern"] == pattern
    assert tokenizer.get_vocab_size() == 275 and not again.training
    assert build_model(folder, 30, "cpu", "train")[0].training
    data, optimizers, _ = load_checkpoint(folder, 30, "cpu", load_optimizer=True)
    assert list(data) == list(model.state_dict()) and len(optimizers) == 2
    assert load_checkpoint(folder, 30)[1] is None
    with plait_folder("base", "d2") as converted:  # as `plait` loads it, tokenizer and all
        native = load_plait(converted)
    assert torch.equal(native(ids).logits, model(ids)) and native.tokenizer is not None
    assert not converted.exists()


def test_an_old_checkpoint_without_a_pattern_is_an_all_transformers(base: Path) -> None:
    model = make(None)
    old = {"sequence_len": 32, "vocab_size": 275, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    saved(model, base / "mid_checkpoints" / "d2", 5, {"step": 5, "model_config": old})
    again, _, meta = load_model("mid", "cpu", "eval")
    assert again.block_pattern == ["T", "T"] and "block_pattern" not in meta["model_config"]
    ids = torch.randint(275, (1, 7))
    assert torch.equal(again(ids), model(ids))
    assert {**old, "block_pattern": None}.items() <= again.config.__dict__.items()


def test_the_largest_depth_and_the_last_step_are_meant(base: Path) -> None:
    folder = base / "base_checkpoints"
    for tag, step in (("d2", 100), ("d10", 7), ("d10", 20), ("other", 3)):
        saved(make(None), folder / tag, step)
    assert find_largest_model(folder) == "d10" and find_last_step(folder / "d10") == 20
    assert load_model("base")[2]["step"] == 20
    assert load_model_from_dir(folder, "cpu", "eval", model_tag="d2")[2]["step"] == 100
    assert load_model("base", step=7)[2]["step"] == 7
    for tag in ("d2", "d10"):
        shutil.rmtree(folder / tag)
    os.utime(folder / "other", (2e9, 2e9))
    saved(make(None), folder / "older", 4)
    os.utime(folder / "older", (1e9, 1e9))
    assert find_largest_model(folder) == "other"


def test_what_is_not_there_or_does_not_fit_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'bse' is none of base, mid, sft, rl .did you mean 'base'"):
        load_model("bse")
    with pytest.raises(CheckpointError, match=r"there is no model in .*sft_checkpoints"):
        load_model("sft")
    folder = base / "base_checkpoints" / "d2"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds no model_<step>\.pt"):
        load_model("base")
    model = make(["T", "M"])
    saved(model, folder, 1)
    with pytest.raises(CheckpointError, match="phase 'test' is none of train, eval"):
        build_model(folder, 1, "cpu", "test")
    meta = json.loads((folder / "meta_000001.json").read_text())
    for change, words in (
        ({"block_pattern": None}, r"transformer\.h\.1\.attn\.c_q\.weight is missing"),
        ({"n_embd": 64}, "shape"),
        ({"window_pattern": "SSSL"}, "not a model of October 2025"),
        ({"block_pattern": ["T"]}, "must match"),
    ):
        wrong = {**meta, "model_config": {**meta["model_config"], **change}}
        (folder / "meta_000001.json").write_text(json.dumps(wrong))
        with pytest.raises((CheckpointError, ValueError), match=words):
            build_model(folder, 1, "cpu", "eval")
    (folder / "meta_000001.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no model_config"):
        build_model(folder, 1, "cpu", "eval")
    saved(make(None, vocab_size=97), folder, 2)
    with pytest.raises(CheckpointError, match="the tokenizer has 275 ids, but the model 97"):
        build_model(folder, 2, "cpu", "eval")


def test_a_pickled_tokenizer_is_opened_only_if_that_is_allowed(base: Path) -> None:
    own = RustBPETokenizer.from_directory(base / "tokenizer")
    write_tokenizer(own.tokenizer, base / "theirs")
    with pytest.raises(TokenizerError, match="is a pickle, which can hide code"):
        RustBPETokenizer.from_directory(base / "theirs")
    again = RustBPETokenizer.from_directory(base / "theirs", allow_pickle=True)
    assert again.encode(TEXTS[0]) == own.encode(TEXTS[0])


def test_the_originals_own_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of October 2025: the later one, its embedding in bfloat16, is meant."""
    shutil.copytree(FIXTURES / "nanochat_oct2025" / "base_checkpoints", tmp_path / "base_checkpoints")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert find_last_step(tmp_path / "base_checkpoints" / "d4") == 20
    with pytest.raises(TokenizerError, match="holds no nanochat tokenizer"):
        load_model("base")
