"""``plait estimate``: the simulated peak of a step against the memory that a real one takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.training.estimate import estimate, parse_size
from plait.training.memory import step_memory

CPU = torch.device("cpu")

# The real step, in a process of its own. The kernel's high-water mark is of the whole process, so what stood before
# the model is taken off; glibc must give back what is freed, or its free lists are measured too.
MEASURE = """
import json, sys, torch
from plait.config.load import load_config
from plait.models.model import Model
from plait.training.optimizers import Optimizer

def status(key):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

given = json.loads(sys.argv[1])
config = load_config(given["config"])
def step(model, optimizer, ids):
    optimizer.zero_grad()
    model(ids, labels=ids).loss_sum.backward()
    torch.nn.utils.get_total_norm(optimizer.gradients())
    optimizer.step()

model = Model(config.model, device="cpu").train()
optimizer = Optimizer(model, config.training)
optimizer.set_lr(1.0)
few = torch.zeros(1, 16, dtype=torch.int64)
model(few, labels=few).loss_sum.backward()  # what libraries load at first use is not the step's
model.zero_grad(set_to_none=True)
before = status("VmRSS:") - 4 * sum(p.numel() for p in model.parameters())
ids = torch.zeros(given["rows"], given["length"], dtype=torch.int64)
for _ in range(2):
    step(model, optimizer, ids)
print(json.dumps(status("VmHWM:") - before))
"""


def model_config(pattern: str, **training: object) -> dict[str, object]:
    return {
        "model": {"pattern": pattern, "d_model": 256, "vocab_size": 2000, "mamba2": {"headdim": 32}},
        "training": training,
    }


def measured(config: dict[str, object], rows: int, length: int) -> int:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0"}
    given = json.dumps({"config": config, "rows": rows, "length": length})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, given], capture_output=True, text=True, env=environment, check=True
    )
    return int(json.loads(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="not on this platform")
@pytest.mark.parametrize(("pattern", "optimizer"), [("M2 T M2 T", "adamw"), ("T*3", "muon")])
def test_the_estimate_is_within_15_percent_of_what_a_step_takes(pattern: str, optimizer: str) -> None:
    given = model_config(pattern, optimizer=optimizer)
    config = load_config(given)
    found = step_memory(config.model, config.training, 4, 512, accumulate=False, device=CPU)
    real = measured(given, 4, 512)
    assert real > 200e6  # the libraries' own tens of MB must not decide
    assert found.peak == pytest.approx(real, rel=0.15)


def test_parts_are_counted_exactly() -> None:
    config = load_config(model_config("M2 T"))
    found = step_memory(config.model, config.training, 1, 64, accumulate=False, device=CPU)
    from plait.models.model import Model

    weights = sum(4 * p.numel() for p in Model(config.model, device="meta").parameters())
    assert found.weights == found.gradients == weights
    assert 2 * weights <= found.optimizer < 2.01 * weights + 4096  # two averages, and a count of steps each
    assert found.peak == found.weights + found.gradients + found.optimizer + found.activations


def test_recomputation_keeps_less_and_bfloat16_half() -> None:
    def activations(**training: object) -> int:
        config = load_config(model_config("M2 T M2 T", **training))
        return step_memory(config.model, config.training, 8, 256, accumulate=False, device=CPU).activations

    plain = activations()
    assert activations(activation_checkpointing=True) < 0.5 * plain
    assert activations(precision="bf16") < 0.8 * plain


def test_what_fits_fits_and_one_row_more_does_not() -> None:
    config = load_config(model_config("M2 T"))
    memory = 300_000_000
    fits = estimate(config, config.model, memory, lengths=(128, 512)).fits
    assert [fit.length for fit in fits] == [128, 512, config.data.sequence_length]
    for fit in fits:
        more = step_memory(
            config.model, config.training, fit.rows + 1, fit.length, accumulate=True, device=CPU
        )
        assert fit.peak <= memory < more.peak
    assert fits[0].rows > fits[1].rows > 0
    assert fits[1].state is not None and fits[0].state is not None and fits[1].state > fits[0].state


def test_a_memory_too_small_for_one_row_is_told() -> None:
    config = load_config(model_config("M2 T"))
    found = estimate(config, config.model, 10_000_000, lengths=())
    assert not found.enough
    assert found.fits[0].rows == 0


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("12GB", 12e9), ("12 GiB", 12 * 2**30), ("1.5g", 1.5e9), ("500MB", 5e8), ("64KiB", 65536), ("7", 7)],
)
def test_sizes(text: str, bytes_: float) -> None:
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "12 apples", "-3GB", "GB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not an amount of memory"):
        parse_size(text)
