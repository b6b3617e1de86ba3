"""The smaller parts: loss scale, metrics, curve, dry run, the live line."""

from __future__ import annotations

import builtins
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from plait.config.errors import BuildError, TrainingError
from plait.config.load import load_config
from plait.models.model import Model
from plait.training.dry_run import dry_run, matmul_rate, size
from plait.training.metrics import Metrics, read_metrics
from plait.training.optimizers import Optimizer
from plait.training.plot import plot_run, smoothed
from plait.training.precision import GROW_AFTER, LossScaler, autocast, product_dtype
from plait.training.progress import Clock, Progress, Status, duration


def test_the_loss_scale_halves_and_doubles() -> None:
    scaler = LossScaler("fp16")
    start = scaler.scale
    assert not scaler.accept(math.inf) and not scaler.accept(math.nan)
    assert scaler.scale == start / 4
    assert all(scaler.accept(1.0) for _ in range(GROW_AFTER))
    assert scaler.scale == start / 2
    other = LossScaler("fp16")
    other.load(scaler.state())
    assert other.scale == scaler.scale and other.good_steps == 0
    with pytest.raises(TrainingError, match="bf16"):
        for _ in range(100):
            scaler.accept(math.inf)
    plain = LossScaler("fp32")
    plain.load(scaler.state())
    assert plain.scale == 1.0 and plain.accept(3.0) and not plain.accept(math.nan)


def write_run(folder: Path, bits: bool = True) -> Path:
    metrics = Metrics(folder)
    for step in range(1, 101):
        value = 2 + 6 * math.exp(-step / 10)
        record = {"kind": "train", "step": step, "loss": value, "bits_per_byte": value if bits else None}
        metrics.write(record)
        if step % 20 == 0:
            metrics.write({**record, "kind": "evaluation"})
    return folder


def test_metrics_are_cut_back_and_forgive_a_half_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "st')
    assert len(read_metrics(tmp_path)) == 105
    metrics = Metrics(tmp_path, step=40)
    metrics.write({"kind": "train", "step": 41})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 41 and len(steps) == 43
    Metrics(tmp_path)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("bits", [True, False])
def test_the_curve_is_drawn(tmp_path: Path, bits: bool) -> None:
    write_run(tmp_path, bits)
    path = plot_run(tmp_path)
    assert (
        path == tmp_path / "loss.png"
        and path.read_bytes().startswith(b"\x89PNG")
        and path.stat().st_size > 10_000
    )
    other = plot_run(tmp_path, tmp_path / "new" / "curve.png")
    assert other.is_file()


def test_a_curve_of_nothing_or_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="holds no logged step"):
        plot_run(tmp_path)
    write_run(tmp_path)
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TrainingError, match=r"pip install 'plait\[plots\]'"):
        plot_run(tmp_path)


def test_smoothing_begins_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([3.0] * 200) == pytest.approx([3.0] * 200)
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]


def test_a_dry_run_counts_what_a_run_has() -> None:
    config = load_config(
        {
            "model": {"d_model": 32, "pattern": "mamba2 T", "mlp": "swiglu"},
            "data": {"sequence_length": 64},
            "training": {"batch_tokens": 256, "optimizer": "muon", "device": "cpu", "steps": 10},
        }
    )
    found = dry_run(config)
    model = Model(config.model.model_copy(update={"vocab_size": 260}))
    assert found.parameters == model.parameter_counts()
    assert found.weights == found.gradients == sum(p.numel() * 4 for p in model.parameters())
    state = Optimizer(model, config.training).state()
    assert found.optimizer == sum(t.numel() * 4 for t in state.values())
    assert sum(found.groups.values()) == found.parameters["total"]
    assert found.cache == model.new_cache(1, 64).nbytes
    assert found.flops_per_step == 3 * 4 * model.flops(64) and found.tokens_per_step == 256
    assert found.fastest > 0
    text = "\n".join(found.lines())
    assert "estimate" in text and "(muon" not in text and f"{found.parameters['total']:,}" in text


def test_a_dry_run_knows_what_saves_memory_and_refuses_what_cannot_be_built() -> None:
    values: dict[str, Any] = {"model": {"d_model": 32, "pattern": "T*6"}, "training": {"device": "cpu"}}
    plain = dry_run(load_config(values))
    values["training"]["activation_checkpointing"] = True
    less = dry_run(load_config(values))
    assert less.activations < plain.activations / 2 and less.flops_per_step > plain.flops_per_step
    with pytest.raises(BuildError, match="is not causal"):
        dry_run(load_config({"model": {"d_model": 32, "pattern": "lstm", "lstm": {"bidirectional": True}}}))


def test_a_dry_run_allocates_nothing() -> None:
    config = load_config({"model": {"d_model": 16384, "n_layer": 100}, "training": {"device": "cpu"}})
    assert dry_run(config).weights > 500 * 2**30


def test_sizes_and_times_are_readable() -> None:
    assert [size(n) for n in (10, 2048, 5 * 2**20, 3 * 2**41)] == ["10 B", "2.0 KiB", "5.0 MiB", "6144.0 GiB"]
    assert [duration(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]
    long = [duration(s) for s in (172799, 200000, 3e8)]
    assert long == ["47:59:59", "2.3 days", "3,472 days"]
    assert matmul_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8


def test_the_live_line_and_the_plain_line() -> None:
    status = Status(50, 100, 0.5, 2.0, 2.9, 1e-3, 12345.0, 60.0)
    for terminal in (True, False):
        screen = io.StringIO()
        with Progress(console=Console(file=screen, width=200, force_terminal=terminal)) as progress:
            progress.step(status, line=False)
            progress.step(status, line=True)
        text = screen.getvalue()
        for words in ("step 50/100", "50 %", "2.900 bits/byte", "12,345 tokens/s", "1:00 left", "GiB"):
            assert words in text
        assert ("\x1b" in text) == terminal and (text.count("step 50/100") == 1 or terminal)
    screen = io.StringIO()
    with Progress(shown=False, console=Console(file=screen)) as progress:
        progress.step(status, line=True)
        progress.message("silent")
    assert screen.getvalue() == ""


def test_the_clock_counts_tokens_between_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("plait.training.progress.time.monotonic", lambda: now)
    clock = Clock(elapsed=10.0)
    rates = []
    for _ in range(3):
        now += 2.0
        rates.append(clock.rate(1000))
    now += 50.0  # an evaluation
    clock.pause()
    now += 2.0
    assert [*rates, clock.rate(1000)] == [500.0] * 4
    assert clock.elapsed == 68.0


@pytest.mark.parametrize(
    ("device", "computes", "dtype"),
    [
        ("cpu", True, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float32),
        ("mps", True, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_a_gpu_computes_in_it(
    device: str, computes: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return computes or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert product_dtype("auto", torch.device(device)) == dtype
    assert product_dtype("fp16", torch.device(device)) == torch.float16
    assert not LossScaler("auto").active


def test_auto_on_a_cpu_is_no_autocast() -> None:
    with autocast("auto", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("bf16", torch.device("cpu")):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
