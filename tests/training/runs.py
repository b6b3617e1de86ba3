"""Small runs for the tests of training: a corpus, a config, and a run in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from plait.config.load import load_config
from plait.config.schema import Config
from plait.training import TrainResult, train

ROOT = Path(__file__).parents[2]


def corpus(folder: Path, documents: int = 11, seed: int = 0) -> Path:
    """A folder of short texts of different lengths, made of a few words."""
    rng = random.Random(seed)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "sleeps",
        "under",
        "trees",
    ]
    path = folder / "corpus"
    path.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(3, 40)))
        (path / f"{number:03}.txt").write_text(text + ".\n")
    return path


def values(folder: Path, **training: Any) -> dict[str, Any]:
    """A run of a tiny hybrid with dropout, accumulation and several epochs, as plain values."""
    model = training.pop("model", {})
    data = training.pop("data", {})
    return {
        "model": {
            "d_model": 16,
            "pattern": "attention lstm",
            "mlp": "none",
            "dropout": 0.1,
            "attention": {"n_head": 2},
            **model,
        },
        "data": {
            "train": str(folder / "corpus"),
            "validation_fraction": 0.2,
            "cache": str(folder / "cache"),
            "sequence_length": 32,
            **data,
        },
        "training": {
            "steps": 8,
            "batch_tokens": 160,
            "micro_batch_tokens": 64,
            "lr": 3e-3,
            "log_every": 1,
            "eval_every": 0,
            "checkpoint_every": 0,
            "out": str(folder / "run"),
            **training,
        },
    }


def tiny(folder: Path, **training: Any) -> Config:
    """``values`` as a Config, with its corpus written."""
    corpus(folder)
    return load_config(values(folder, **training))


def run(folder: Path, **training: Any) -> TrainResult:
    """Train a tiny run."""
    return train(tiny(folder, **training), quiet=True)


def losses(run_folder: Path) -> dict[int, float]:
    """Step to training loss."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def evaluations(run_folder: Path) -> dict[int, float]:
    """Step to held-out bits per byte."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"}


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """sha256 of every tensor in a checkpoint: weights, optimizer, random numbers."""
    return {
        f"{path.name}: {name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for path in checkpoint.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def spawn(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Python code in a process of its own, one thread, with ``tests`` importable."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
