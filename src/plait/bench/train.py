"""Training steps of whole models: tokens a second and memory, beside the same models of other packages.

A step is the trainer's own: forward, backward, the check of loss and gradient, clipping, AdamW, on a fixed batch of
random tokens that lies on the host. Each model passed these checks first: two of its layers against the float64
reference (`models.check`), and its first loss against that of guessing and, on a CPU, that of the portable backend.
What fails is a row that says why, with no time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from plait.bench.memory import in_use, peak_of
from plait.bench.models import check, check_loss, failure, kernels, model_config, ran_by, require, split_name
from plait.bench.peer_models import Prepared, training_peers
from plait.bench.timing import Result, Timing, steady, wait
from plait.config.load import load_config
from plait.config.training import TrainingConfig
from plait.data.batch import Batch
from plait.models.model import Model
from plait.ops.dispatch import use_backend
from plait.tokenizers.load import load_tokenizer
from plait.training.distributed import World, spread
from plait.training.heap import kept_memory
from plait.training.objectives import make_objective
from plait.training.optimizers import Optimizer
from plait.training.precision import DTYPES, LossScaler, autocast
from plait.training.step import train_step
from plait.training.wrap import compile_blocks, recompute_blocks

DEFAULTS = {
    "cpu": (("mamba-70m", "mamba2-70m", "transformer-70m"), ((1, 256), (1, 512), (1, 1024), (1, 2048))),
    "cuda": (("mamba-370m", "mamba2-370m", "transformer-370m"), ((16, 2048), (4, 8192), (1, 32768))),
}
"""Models, and (sequences, tokens of each)."""

Maker = Callable[[], Prepared]
SAME_LOSS, SAME_LOSS_NARROW = 1e-4, 2e-2
"""How far the first loss may be from the portable backend's, relative; with products in 16 bits."""
LONG = 10.0
"""Seconds: a step that takes longer is timed once."""


def benchmark_training(
    device: torch.device,
    *,
    models: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    precision: str | None = None,
    compiled: bool = False,
    checkpointing: str = "none",
    peers: bool = True,
    by: str | None = None,
    apart: bool = False,
    seconds: float = 10.0,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Result:
    """Time the named models at (sequences, tokens of each); ``say`` is given each row as it comes.

    precision: fp32, bf16 or fp16; None: bf16 on a GPU, else fp32. compiled, checkpointing: as ``training.compile`` and
    ``training.activation_checkpointing``. peers: also models of other packages, where installed; by: only that one's,
    or "plait". apart: each row is measured in a process of its own, one after the other, so that its memory is its own,
    and peers get memory as they would without Plait; else models of one shape take turns (on a CPU).
    """
    own_models, own_sizes = DEFAULTS[device.type]
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    result = Result("train", str(device))
    names = list(models or own_models)
    for name in names:
        split_name(name)  # a mistake is told before anything is measured
    options = _Options(device, precision, compiled, checkpointing, peers, by, seconds)
    for name in names:
        for row in (_apart if apart else _checked)(name, sizes or own_sizes, options):
            result.rows.append(row)
            say(row)
    return result


@dataclass(frozen=True)
class _Options:
    """As of ``benchmark_training``."""

    device: torch.device
    precision: str
    compiled: bool
    checkpointing: str
    peers: bool
    by: str | None
    seconds: float


def _apart(name: str, sizes: Sequence[tuple[int, int]], options: _Options) -> Iterator[dict[str, Any]]:
    """Rows of one model, by the same command in new processes."""
    every = ["plait", *training_peers(name, torch.zeros(sizes[0]), options.device, options.precision)]
    labels = [label for label in every if options.by in (None, label) and (options.peers or label == "plait")]
    flags = ["--compile"] if options.compiled else []
    with TemporaryDirectory() as folder:
        for (sequences, tokens), label in product(sizes, labels):
            file = Path(folder) / "rows.json"
            file.unlink(missing_ok=True)
            words = [
                *(
                    "train",
                    name,
                    "--size",
                    f"{sequences}x{tokens}",
                    "--by",
                    label,
                    "--json",
                    str(file),
                    *flags,
                ),
                *("--device", options.device.type, "--precision", options.precision),
                *("--checkpointing", options.checkpointing, "--seconds", str(options.seconds)),
            ]
            done = subprocess.run(
                [sys.executable, "-m", "plait", "bench", *words], capture_output=True, text=True, check=False
            )
            if file.is_file():
                yield from json.loads(file.read_text(encoding="utf-8"))["rows"]
            else:
                why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                yield {"model": name, "shape": f"B{sequences} L{tokens}", "by": label, "failed": why}


def _checked(name: str, sizes: Sequence[tuple[int, int]], options: _Options) -> Iterator[dict[str, Any]]:
    """Rows of one model; one row that says so if it computes wrong."""
    device, precision = options.device, options.precision
    try:
        if options.by in (None, "plait"):
            check(name, device, DTYPES.get(precision, torch.float32))
    except Exception as fault:  # whatever a backend does wrong here is one model's, and is reported
        yield {"model": name, "shape": "-", "by": "plait", "precision": precision, "failed": failure(fault)}
        return
    vocabulary = split_name(name)[1].vocabulary
    for size in sizes:
        ids = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
        makers: dict[str, Maker] = {"plait": partial(_own, name, ids, options)}
        if options.peers:
            makers |= training_peers(name, ids, device, precision)
        if options.by is not None:
            makers = {label: make for label, make in makers.items() if label == options.by}
        what = {"model": name, "shape": f"B{size[0]} L{size[1]}", "precision": precision}
        # A GPU holds few models, and is quiet: one after the other. On a CPU they take turns.
        groups = [{label: make} for label, make in makers.items()] if device.type == "cuda" else [makers]
        with kept_memory(device) if "plait" in makers else nullcontext():  # as the trainer does
            for group in groups:
                yield from _rows(name, what, group, ids.numel(), device, options.seconds)


def _rows(
    name: str,
    what: dict[str, Any],
    makers: dict[str, Maker],
    n_tokens: int,
    device: torch.device,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """What these makers' steps take, in one run."""
    ready: list[tuple[dict[str, Any], Prepared]] = []
    for label, make in makers.items():
        row = {**what, "by": label}
        try:
            measured, model = _first_steps(name, label, make, device)
            ready.append(({**row, **measured}, model))
        except Exception as fault:  # as above
            yield {**row, "failed": failure(fault)}
    steps = [model.step for _, model in ready]
    if device.type == "cuda":
        timings = [steady(step, device, seconds=seconds) for step in steps]
    else:
        timings = _turns([model for _, model in ready], seconds)
    for (row, model), timing in zip(ready, timings, strict=True):
        rate = 1000 * n_tokens / timing.median
        passes: dict[str, float] = {}
        if device.type == "cpu":  # elsewhere the host is ahead of the device
            taken = 1000 * statistics.median(model.laps[-timing.n :])
            passes = {
                "forward_backward_ms": taken,
                "forward_backward_tokens_per_second": 1000 * n_tokens / taken,
            }
        yield {**row, "step_ms": timing.median, "tokens_per_second": rate, **passes, "repeats": timing.n}


def _turns(models: Sequence[Prepared], seconds: float) -> list[Timing]:
    """Time their steps in turns, about so many seconds each: 2 to 200 times, but once if a step takes very long."""
    slowest = max((model.laps[-1] for model in models), default=0.0)
    repeats = max(2 if slowest < LONG else 1, min(200, int(seconds / max(slowest, 1e-3))))
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        for times, model in zip(taken, models, strict=True):
            begin = time.perf_counter()
            model.step()
            times.append(1000 * (time.perf_counter() - begin))
    return [Timing(statistics.median(t), min(t), max(t), len(t)) for t in taken]


def _first_steps(name: str, label: str, make: Maker, device: torch.device) -> tuple[dict[str, Any], Prepared]:
    """Build, take the first step, which compiles what is not compiled yet, and one to look at the memory."""
    before = in_use(device)
    model = make()
    begin = time.perf_counter()
    first = model.step()
    wait(device)
    seconds = time.perf_counter() - begin
    if label == "plait":
        check_loss(name, first)
    peak = peak_of(model.step, device, before)
    return {
        "parameters": model.parameters,
        "first_step_s": seconds,
        "first_loss": first,
        "peak_gib": None if peak is None else peak / 2**30,
        **ran_by(model.ran),
    }, model


def _own(name: str, ids: Tensor, options: _Options) -> Prepared:
    """Plait's model and the trainer's step; its first loss is checked."""
    device, precision = options.device, options.precision
    values = {"precision": precision, "lr": 1e-4, "warmup": 0}
    config = load_config({"model": model_config(name).model_dump(exclude_unset=True), "training": values})
    objective = make_objective(config, load_tokenizer(config.tokenizer))
    torch.manual_seed(0)
    model = Model(config.model, device=device).train()
    few = ids[:1, :64].to(device)

    def short() -> None:
        with autocast(config.training.precision, device):
            loss = model(few, labels=few).loss_sum
        loss.backward()
        model.zero_grad(set_to_none=True)

    ran = kernels(short)
    true: float | None = None
    if device.type == "cpu":
        with torch.no_grad(), use_backend("portable"):
            true = float(model(ids, labels=ids).loss)
    if options.compiled:
        compile_blocks(model.blocks)
    recompute_blocks(model.blocks, options.checkpointing)
    world = World(0, 1, device)
    forward = spread(model, list(model.blocks), "replicate", world)
    optimizer, scaler = _TimedOptimizer(model, config.training), LossScaler(precision)
    optimizer.set_lr(1.0)
    n_targets = ids.shape[0] * (ids.shape[1] - 1)
    batch = Batch(ids, ids, n_tokens=ids.numel(), n_targets=n_targets)

    def step() -> float:
        optimizer.begin = time.perf_counter()
        update = train_step(forward, objective, optimizer, [batch], n_targets, config.training, scaler, world)
        if true is not None and len(optimizer.laps) == 1:
            most = SAME_LOSS if precision == "fp32" else SAME_LOSS_NARROW
            require(f"{name}, the first loss", abs(update.loss / true - 1), most)
        return update.loss

    return Prepared(step, optimizer.laps, sum(p.numel() for p in model.parameters()), ran)


class _TimedOptimizer(Optimizer):
    """Notes when backward has ended: the gradients are asked for."""

    def __init__(self, model: Model, config: TrainingConfig) -> None:
        super().__init__(model, config)
        self.begin = 0.0
        self.laps: list[float] = []

    def gradients(self) -> list[Tensor]:
        """See ``Optimizer``."""
        self.laps.append(time.perf_counter() - self.begin)
        return super().gradients()
