"""Defects of the nanochat hybrid that would lie in its face: configs, dispatch, config objects, inert arguments.

The numbers are those of the list of defects; the others are tested where their subject is.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
import plait.compat.nanochat as package
from plait.compat.nanochat.blocks import BaseBlock, create_block, register_block
from plait.compat.nanochat.checkpoint_manager import load_model
from plait.compat.nanochat.gpt import GPT, GPTConfig, norm
from plait.compat.nanochat.scripts import base_train
from plait.config.errors import BuildError, ConfigError
from plait.config.load import load_config
from plait.config.originals.nanochat import WHOLE_BLOCKS
from plait.config.table import TABLE
from plait.mixers.adapter import ModuleMixer
from tests.invariants import redraw
from tests.training.runs import corpus

SIZES = {"sequence_len": 32, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
WORDS = [
    "--max_seq_len=16",
    "--device_batch_size=2",
    "--total_batch_size=64",
    "--num_iterations=3",
    "--eval_tokens=32",
    "--sample_every=-1",
    "--device_type=cpu",
    "--data.train=corpus",
    "--data.validation_split=documents",
    "--tokenizer={type: bytes}",
    "--model.d_model=16",
    "--model.attention={n_head: 2, n_kv_head: 2}",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a corpus and nanochat's folder in it."""
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("how", ["in the file", "on the command line"])
def test_defect_1_the_pattern_in_the_config_is_what_trains_is_saved_and_reloads(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There every "hybrid" run trained a pure transformer, and --block_pattern was unknown."""
    pattern = ["T", "M", "M", "T", "M"]
    file = folder / "mine.py"
    file.write_text(f"depth = 5\n{f'block_pattern = {pattern}' if how == 'in the file' else ''}\n")
    words = [] if how == "in the file" else [f"--block_pattern={pattern}"]
    assert base_train.main([str(file), *words, *WORDS]) == 0
    shown = ast.literal_eval(capsys.readouterr().out.splitlines()[0].partition(": ")[2])
    assert shown["block_pattern"] == pattern
    kinds = ["mamba" if name == "M" else "attention" for name in pattern]
    run = folder / "base" / "base_checkpoints" / "d5"
    assert [layer.kind for layer in load_config(run / "config.yaml").model.layers()] == kinds
    model = plait.load(run)
    assert [block.kind for block in model.blocks] == kinds
    face, _, meta = load_model("base")
    assert face.block_pattern == pattern == meta["model_config"]["block_pattern"]
    ids = torch.randint(256, (1, 9))
    assert torch.equal(face(ids), model(ids).logits)
    trained = [block.mixer.out_proj.weight.abs().max() for block in model.blocks]
    assert all(size > 0 for size in trained), "they began at zero: each was trained"


def test_defect_1_an_unknown_key_is_an_error(folder: Path) -> None:
    file = folder / "mine.py"
    file.write_text("depth = 5\nblock_patern = ['M'] * 5\n")
    with pytest.raises(
        ConfigError, match=r"mine\.py: block_patern: unknown key.*did you mean 'block_pattern'"
    ):
        base_train.main([str(file), *WORDS])


@pytest.fixture
def strange() -> Iterator[None]:
    """Two blocks that asking for an attribute "attn" would mistake for one another."""

    @register_block("with_attn")
    class WithAttn(BaseBlock):
        """It has an "attn", takes no context at all, and is no transformer."""

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.attn = nn.Linear(config.n_embd, config.n_embd)

        def forward(self, x: Tensor, context: dict[str, Any] | None = None) -> Tensor:
            return x + self.attn(x)

    @register_block("without_attn")
    class WithoutAttn(BaseBlock):
        """It has no "attn" and needs the rotary tables."""

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, context: dict[str, Any] | None = None) -> Tensor:
            assert context is not None
            cos, sin = context["cos_sin"]
            return x + (self.gain * (cos + sin).float()).sum(-1)

    yield
    for name in ("with_attn", "without_attn"):
        TABLE.pop(name)
        WHOLE_BLOCKS.discard(name)


@pytest.mark.usefixtures("strange")
def test_defect_6_no_block_is_chosen_or_fed_by_the_attributes_it_has() -> None:
    config = GPTConfig(**{**SIZES, "block_pattern": ["with_attn", "without_attn", "M"]})
    model = GPT(config)
    redraw(model)
    assert model(torch.randint(61, (2, 7))).isfinite().all()
    tables: dict[str, Any] = {"cos_sin": (torch.ones(1, 7, 1, 8), torch.zeros(1, 7, 1, 8)), "kv_cache": None}
    x = torch.randn(1, 7, 32)
    for block in model.transformer.h:  # one call for all kinds
        assert block(x, tables).shape == x.shape
    assert type(create_block("with_attn", config, 0)) is type(model.transformer.h[0])


def test_defect_6_nobody_asks_a_block_for_its_attributes() -> None:
    for path in Path(next(iter(package.__path__))).rglob("*.py"):
        called = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if is_call(node)}
        assert "hasattr" not in called, path


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def test_defect_8_the_config_that_was_given_is_left_as_it_was() -> None:
    """There None became a list in the caller's own object, and metas stopped loading in stock nanochat."""
    config = GPTConfig(**SIZES)
    before = json.dumps(config.__dict__)
    model = GPT(config)
    assert config.block_pattern is None and json.dumps(config.__dict__) == before
    assert model.config.block_pattern is None and model.block_pattern == ["T", "T", "T"]
    given = ["T", "M", "T"]
    config = GPTConfig(**{**SIZES, "block_pattern": given})
    model = GPT(config)
    given.append("M")
    assert model.config.block_pattern == ["T", "M", "T"] == model.block_pattern
    with pytest.raises(Exception, match="cannot assign to field"):
        config.block_pattern = None  # type: ignore[misc]


def test_defect_8_two_models_of_one_config_are_alike() -> None:
    config = GPTConfig(**SIZES)
    first, second = GPT(config), GPT(config)
    assert first.config == second.config == config and first.block_pattern == second.block_pattern


def test_defect_9_the_third_strategy_has_twenty_entries() -> None:
    printed = ["T", "T"] + ["M"] * 6 + ["T"] + ["M"] * 6 + ["T", "M", "T", "T"]
    right = ["T", "T"] + ["M"] * 7 + ["T"] + ["M"] * 6 + ["T", "M", "T", "T"]
    sizes = {**SIZES, "n_layer": 20}
    with torch.device("meta"):
        with pytest.raises(ValueError, match="it has 19 block types, which must match the 20 layers"):
            GPT(GPTConfig(**{**sizes, "block_pattern": printed}))
        model = GPT(GPTConfig(**{**sizes, "block_pattern": right}))
    kinds = [block.kind for block in model.model.blocks]
    assert [i for i, kind in enumerate(kinds) if kind == "attention"] == [0, 1, 9, 16, 18, 19]
    text = (Path(next(iter(package.__path__))) / "configs" / "README.md").read_text()
    assert '["T", "T"] + ["M"] * 7 + ["T"] + ["M"] * 6 + ["T", "M", "T", "T"]' in text


def test_defect_13_no_argument_is_accepted_and_ignored() -> None:
    model = GPT(GPTConfig(**{**SIZES, "block_pattern": ["T", "M", "T"]}))
    with pytest.raises(TypeError, match="inference_params"):
        model(torch.zeros(1, 2, dtype=torch.int64), inference_params=object())
    for block in model.transformer.h:
        with pytest.raises(BuildError, match="inference_params: a block alone keeps no state"):
            block(torch.zeros(1, 2, 32), {"inference_params": object()})
    assert "kwargs" not in inspect.signature(model.forward).parameters


# Another value of each field, and whether the model it makes is told apart by its parameters or by its numbers.
FIELDS: dict[str, Any] = {
    "sequence_len": 64,
    "vocab_size": 71,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 1,
    "n_embd": 64,
    "block_pattern": ["T", "T", "M"],
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_expand": 3,
    "mamba_use_mlp": True,
}


def test_defect_13_every_field_of_the_config_takes_effect() -> None:
    assert set(FIELDS) == set(GPTConfig().__dict__)

    def facts(config: GPTConfig) -> Any:
        with torch.device("meta"):
            model = GPT(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        heads = [getattr(block.mixer, "n_head", None) for block in model.model.blocks]
        return shapes, heads, model.cos.shape

    base: dict[str, Any] = {**SIZES, "block_pattern": ["T", "M", "M"]}
    for name, value in FIELDS.items():
        changed = {**base, name: value}
        if name == "n_layer":
            changed["block_pattern"] = [*base["block_pattern"], "M"]
        assert facts(GPTConfig(**changed)) != facts(GPTConfig(**base)), name


def test_defect_14_there_is_one_norm() -> None:
    """There the functional norm was written three times; here the face's is the model's, and nothing else norms."""
    x = torch.randn(2, 5, 32)
    model = GPT(GPTConfig(**SIZES))
    assert torch.equal(norm(x), model.model.final_norm(x))
    assert torch.equal(norm(x), model.model.blocks[0].norm1(x))
    for path in Path(next(iter(package.__path__))).rglob("*.py"):
        text = path.read_text()
        assert "rms_norm" not in text and "rsqrt" not in text, path


def test_defect_14_no_import_hides_in_a_function_to_avoid_a_circle() -> None:
    """Imports of one's own package stand at the top (tests/test_import_floors.py looks for circles)."""
    folder = Path(next(iter(package.__path__)))
    for path in [*folder.rglob("*.py"), Path(inspect.getfile(ModuleMixer))]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                inside = [node for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
                assert not [n.module for n in inside if (n.module or "").startswith("plait")], path
