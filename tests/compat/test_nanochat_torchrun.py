"""The documents' own commands, under torchrun with two processes, shrunk by flags to seconds."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import plait
from tests.training.runs import corpus

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NANOCHAT_BASE_DIR": str(folder / "base"),
        "PLAIT_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, "-m", *command, "-m", "plait.compat.nanochat.scripts.base_train", *words],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_alternating_config_trains_the_alternating_model(tmp_path: Path) -> None:
    corpus(tmp_path)
    run = torchrun(
        tmp_path,
        "configs/hybrid_alternating_d20.py",
        "--device_batch_size=2",
        "--max_seq_len=32",
        "--total_batch_size=128",
        "--num_iterations=2",
        "--eval_tokens=64",
        "--sample_every=-1",
        "--data.train=corpus",
        "--data.validation_split=documents",
        "--tokenizer={type: bytes}",
        "--model.d_model=16",  # 20 layers as in the file, but narrow
        "--model.attention={n_head: 2, n_kv_head: 2}",
    )
    assert run.returncode == 0, run.stderr
    (first,) = [line for line in run.stdout.splitlines() if line.startswith("Building model")]
    assert ast.literal_eval(first.partition(": ")[2])["block_pattern"] == ["T", "M"] * 10
    folder = tmp_path / "base" / "base_checkpoints" / "d20"
    assert len(list((folder / "checkpoints" / "step-00000002" / "train").glob("rng-*"))) == 2
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if line["kind"] == "train"] == [1, 2]
    assert [line["tokens"] for line in losses if line["kind"] == "train"] == [128, 256], "of both processes"
    model = plait.load(folder)
    assert [block.kind for block in model.blocks] == ["attention", "mamba"] * 10


@pytest.mark.slow
def test_depth_20_is_depth_20(tmp_path: Path) -> None:
    """Nothing narrowed: what ``-- --depth=20`` would train, counted on both processes and told by one."""
    run = torchrun(tmp_path, "--", "--depth=20", "--dry_run", "--device_type=cpu", "--device_batch_size=1")
    assert run.returncode == 0, run.stderr
    shown = ast.literal_eval(run.stdout.splitlines()[0].partition(": ")[2])
    assert (shown["n_layer"], shown["n_embd"], shown["n_head"], shown["n_kv_head"]) == (20, 1280, 10, 10)
    assert shown["block_pattern"] == ["T"] * 20 and shown["vocab_size"] == 65536
    assert run.stdout.count("Building model") == 1 and "561M" in run.stdout
    assert "21,400 steps, 11.2G tokens" in run.stdout  # 20 tokens for each of 560,988,160 parameters
