"""What the originals' documents print runs under the changed import root, and what ours say is so.

MiniMamba's and BitByte's printed blocks are in tests/compat/test_minimamba.py and test_bitbyte.py, Model Foundry's
configs in tests/config/originals/test_foundry.py.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.cli.table import COMMANDS
from plait.cli.terminal import size
from plait.compat.nanochat.blocks import BaseBlock, create_block
from plait.compat.nanochat.configurator import read_command_line
from plait.compat.nanochat.gpt import GPT, GPTConfig
from plait.compat.nanochat.scripts.base_train import Settings, run_config
from plait.config.block import LinearConfig
from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.pattern import parse_pattern
from plait.models import Model
from plait.training.memory import step_memory

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIGS = Path(str(files("plait.compat.nanochat.configs")))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """What stands under a heading of a page."""
    return page(name).split(f"\n## {heading}\n")[1].split("\n## ")[0]


# ---- the nanochat hybrid: Python blocks, with its own import root

PRINTED: dict[str, tuple[str, str]] = {  # a block, and the types that its model must have
    "pure transformer": (
        "from nanochat.gpt import GPT, GPTConfig\n\nconfig = GPTConfig(n_layer=20)\nmodel = GPT(config)",
        "T" * 20,
    ),
    "pure Mamba": (
        'config = GPTConfig(n_layer=20, block_pattern=["M"] * 20, mamba_d_state=16)\nmodel = GPT(config)',
        "M" * 20,
    ),
    "hybrid": (
        'config = GPTConfig(n_layer=20, block_pattern=["T"] * 12 + ["M"] * 8, mamba_d_state=16)\n'
        "model = GPT(config)",
        "T" * 12 + "M" * 8,
    ),
    "short names": (
        'model = GPT(GPTConfig(n_layer=2, block_pattern=["T", "M"]))',
        "TM",
    ),
    "long names": (
        'model = GPT(GPTConfig(n_layer=2, block_pattern=["transformer", "mamba"]))',
        "TM",
    ),
    "the import": (
        "from nanochat.blocks import create_block\nprint('✓ Import successful')",
        "",
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_printed_python_of_the_hybrid(name: str) -> None:
    """At full size, on tensors without numbers."""
    code, types = PRINTED[name]
    names: dict[str, Any] = {"GPT": GPT, "GPTConfig": GPTConfig}
    with torch.device("meta"):
        exec(code.replace("from nanochat.", "from plait.compat.nanochat."), names)
    if not types:
        assert names["create_block"] is create_block
        return
    kinds = [type(block).__name__ for block in names["model"].transformer.h]
    assert kinds == [{"T": "TransformerBlock", "M": "MambaBlock"}[letter] for letter in types]


def test_a_block_type_that_the_document_calls_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown block type.*'X'"):
        GPT(GPTConfig(n_layer=2, block_pattern=["T", "X"]))


def test_printed_interfaces_of_the_hybrid() -> None:
    """The block's base class, the factory, and the config's new fields."""
    assert inspect.isabstract(BaseBlock) and BaseBlock.__abstractmethods__ == {"forward"}
    assert issubclass(BaseBlock, torch.nn.Module)
    assert list(inspect.signature(BaseBlock.forward).parameters) == ["self", "x", "context"]
    assert inspect.signature(BaseBlock.forward).parameters["context"].default is None
    assert list(inspect.signature(create_block).parameters) == ["block_type", "config", "layer_idx"]
    given = {field.name: field.default for field in fields(GPTConfig) if field.default is not MISSING}
    assert given == {
        "sequence_len": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 6,
        "n_kv_head": 6,
        "n_embd": 768,
        "block_pattern": None,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_use_mlp": False,
    }


def test_the_four_strategies_build_what_they_say() -> None:
    """As from-nanochat.md prints them; the attention of the third is at its beginning, middle and end."""
    code = next(
        b
        for b in re.findall(r"```python\n(.*?)```", page("from-nanochat.md"), re.DOTALL)
        if "strategies" in b
    )
    names: dict[str, Any] = {}
    exec(code, names)
    attention = [[i for i, t in enumerate(p) if t == "T"] for p in names["strategies"].values()]
    assert attention == [list(range(12)), list(range(0, 20, 2)), [0, 1, 9, 16, 18, 19], []]
    for pattern in names["strategies"].values():
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=20, block_pattern=pattern))
        assert model.block_pattern == pattern


# ---- its commands


D20 = {"depth": 20, "width": 1280, "length": 2048, "rows": 32}
COMMAND_LINES: dict[str, tuple[str, dict[str, int]]] = {  # what follows -m scripts.base_train; the pattern
    "-- --depth=20": ("T*20", D20),
    "configs/transformer_d20.py": ("T*20", D20),
    "configs/mamba_d20.py": ("M*20", D20),
    "configs/hybrid_early_t_late_m_d20.py": ("T*12 M*8", D20),
    "configs/hybrid_alternating_d20.py": ("T M " * 10, D20),
    "configs/rtx3070_d16.py": ("T*10 M*6", {"depth": 16, "width": 1024, "length": 1024, "rows": 4}),
    "configs/hybrid_alternating_d20.py --device_batch_size=16 --max_seq_len=1024": (
        "T M " * 10,
        {**D20, "length": 1024, "rows": 16},
    ),
    "configs/mamba_d20.py --device_batch_size=2 --max_seq_len=1024": (
        "M*20",
        {**D20, "length": 1024, "rows": 2},
    ),
}


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_the_printed_training_commands_mean_what_they_say(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as printed; two of them train, shrunk, under torchrun (tests/compat/test_nanochat_torchrun.py)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    pattern, sizes = COMMAND_LINES[words]
    run = run_config(read_command_line(words.split(), Settings))
    assert [layer.kind for layer in run.model.layers()] == [entry.kind for entry in parse_pattern(pattern)]
    training = run.training
    assert {
        "depth": len(run.model.layers()),
        "width": run.model.d_model,
        "length": run.data.sequence_length,
        "rows": (training.micro_batch_tokens or 0) // run.data.sequence_length,
    } == sizes
    assert training.batch_tokens == 524288 and training.tokens_per_parameter == 20
    assert (training.embedding_lr, training.unembedding_lr, training.muon_lr) == (0.2, 0.004, 0.02)


@pytest.mark.slow
def test_the_hybrids_test_file_has_its_ten_tests_and_runs_by_itself() -> None:
    """``pytest tests/test_hybrid_blocks.py`` is part of the suite; as a script it runs them too."""
    path = ROOT / "tests" / "test_hybrid_blocks.py"
    names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    tests = [name for name in names if name.startswith("test_")]
    asked = (
        "default",
        "explicit",
        "hybrid_pattern",
        "alternating",
        "validation",
        "factory",
        "forward_pass_transformer",
    )
    for word in (*asked, "forward_pass_hybrid_gpu", "serialization", "parameter_count"):
        assert any(word in name for name in tests), word
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=200, cwd=ROOT)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) == len(tests) - 1, done.stdout


# ---- numbers in the documents


def parameters(config: str | GPTConfig) -> float:
    """In millions, of a shipped config at 65536 ids, or of a GPTConfig."""
    if isinstance(config, GPTConfig):
        with torch.device("meta"):
            return sum(p.numel() for p in GPT(config).parameters()) / 1e6
    model = load_config(CONFIGS / f"{config}.py").model.replace(vocab_size=65536)
    return Model(model, device="meta").parameter_counts()["total"] / 1e6


def test_a15_numbers_of_parameters_are_counted() -> None:
    """The originals' documents said "d16 390M" and gave depth 20's number to every pattern."""
    d20 = [
        parameters(f"{name}_d20")
        for name in ("transformer", "hybrid_early_t_late_m", "hybrid_alternating", "mamba")
    ]
    wide = {"vocab_size": 65536, "sequence_len": 2048}
    d16 = parameters(GPTConfig(n_layer=16, n_embd=1024, n_head=8, n_kv_head=8, **wide))
    d26 = parameters(GPTConfig(n_layer=26, n_embd=1664, n_head=13, n_kv_head=13, **wide))
    shown = [f"{count:.1f}M" for count in (*d20, d16, parameters("rtx3070_d16"))] + [f"{d26:.0f}M"]
    claims = section("originals.md", "Claims")
    assert [number for number in shown if number not in claims] == []
    compared = section("from-nanochat.md", "Before comparing a baseline with a hybrid")
    assert [number for number in shown[:4] if number not in compared] == []
    readme = (CONFIGS / "README.md").read_text()
    for number, name in zip(
        d20, ("transformer", "hybrid_early_t_late_m", "hybrid_alternating", "mamba"), strict=True
    ):
        assert re.search(rf"`{name}_d20\.py` .*\| {number:.1f}M \|", readme)


def test_a15_numbers_of_memory_are_those_of_the_benchmark() -> None:
    """Each cell of the table, and what the text says of them."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    assert (kept["tokens"], kept["vocabulary"]) == (2048, 65536)
    names = ("activations_fp32", "activations_bf16", "cache_fp32", "cache_bf16")
    claims, rows = section("originals.md", "Claims"), {row["config"]: row for row in kept["rows"]}
    for name, row in rows.items():
        line = (
            f"| `{name}` | {row['parameters'] / 1e6:.0f}M | {' | '.join(size(row[key]) for key in names)} |"
        )
        assert line in claims, line
        assert f"{row['parameters'] / 1e6:.1f}M" == f"{parameters(name):.1f}M"
        model = Model(load_config(CONFIGS / f"{name}.py").model.replace(vocab_size=65536), device="meta")
        for dtype, key in ((torch.float32, "cache_fp32"), (torch.bfloat16, "cache_bf16")):
            assert sum(block.mixer.state_bytes(1, 2048, dtype) for block in model.blocks) == row[key]
    pure, hybrid, mamba = (rows[f"{n}_d20"] for n in ("transformer", "hybrid_early_t_late_m", "mamba"))

    def less(row: dict[str, Any], key: str) -> str:
        return f"{round(100 * (1 - row[key] / pure[key]))} %"

    said = " ".join(claims.split())
    assert f"{pure['cache_fp32'] / mamba['cache_fp32']:.0f} times at 2048 tokens in float32" in said
    assert f"the hybrid {less(hybrid, 'cache_fp32')} less" in said
    assert f"the hybrid needs {less(hybrid, 'activations_fp32')}" in said
    assert f"pure Mamba {less(mamba, 'activations_fp32')} less for activations" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_d20", "mamba_d20"])
def test_a15_the_benchmark_of_memory_is_not_of_an_older_model(name: str) -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    (row,) = [row for row in kept["rows"] if row["config"] == name]
    config = load_config(CONFIGS / f"{name}.py")
    model = config.model.replace(vocab_size=65536)
    step = step_memory(model, config.training, 1, 2048, accumulate=True, device=torch.device("cpu"))
    assert step.activations == pytest.approx(row["activations_fp32"], rel=0.02), (
        "run benchmarks/memory.py again"
    )


def test_no_claim_of_speed_is_made_without_its_file() -> None:
    """A line about speed is not confirmed, or names the file of results that holds its number."""
    lines = [line for line in section("originals.md", "Claims").splitlines() if line.startswith("|")]
    words = ("faster", "as fast", "times a CPU", "minutes longer")
    speed = [line for line in lines if any(word in line.split("|")[1] for word in words)]
    assert len(speed) >= 7
    for line in speed:
        named = re.findall(r"benchmarks/results/[\w.]+", line)
        assert "not confirmed" in line or named, line
    for name in DOCS.glob("*.md"):
        for path in re.findall(r"benchmarks/[\w/]+\.\w+", name.read_text()):
            assert (ROOT / path).is_file(), f"{name.name}: {path}"


# ---- what is not there, and what was asked


def test_what_is_said_to_be_absent_is_absent() -> None:
    """When one of them comes, the page must say so."""
    absent = section("originals.md", "Not there yet")
    assert not {"serve", "distill", "hybridize", "search", "quantize", "report"} & set(COMMANDS)
    with pytest.raises(ConfigError, match="int8"):
        LinearConfig.model_validate({"kind": "int8"})
    for word, kind in (("retention", "retention"), ("RWKV", "rwkv")):
        assert word in absent
        with pytest.raises(ConfigError, match="is not a kind of mixer"):
            parse_pattern(kind)
    for words in (
        "chat page",
        "packed ternary",
        "INT8",
        "distillation",
        "search for a pattern",
        "during training",
    ):
        assert words in absent, words
    refused = section("originals.md", "Not taken over")
    for words in ("reinforcement learning", "sandbox", "spaCy", "diffusion", "8-bit Adam"):
        assert words in refused, words


ENTRIES = {
    "from-nanochat.md": (
        "No module named 'mamba_ssm'",
        "Out of memory",
        "Unknown block type",
        "The first run is slow",
        "An old checkpoint does not load",
        "Requires CUDA",
        "High initial allocation",
    ),
    "from-model-foundry.md": (
        "wants another CUDA or PyTorch",
        "Memory on very long sequences",
        "The first run is slower",
        "It is slow on a CPU",
        "Tests need a GPU",
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_of_troubleshooting_is_answered(name: str) -> None:
    text = section(name, "Troubleshooting")
    for entry in ENTRIES[name]:
        assert entry in text, entry
    answers = re.findall(r"^\*\*[^*]+\*\*(.*(?:\n(?!\n).*)*)", text, re.MULTILINE)
    assert len(answers) >= len(ENTRIES[name]) and all(len(answer.strip()) > 40 for answer in answers)
