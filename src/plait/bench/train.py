"""Training steps of whole models: tokens a second and memory, beside the same models of other packages.

A step is the trainer's own: forward, backward, the check of loss and gradient, clipping, AdamW, on a fixed batch of
random tokens that lies on the host. Each model passed two checks first: two of its layers against the float64 reference
(`models.check`), and its first loss against that of guessing. What fails is a row that says why, with no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plait.bench.memory import in_use, peak_of
from plait.bench.models import check, check_loss, failure, kernels, model_config, ran_by, split_name
from plait.bench.peer_models import training_peers
from plait.bench.timing import Result, measure_together, steady, wait
from plait.config.load import load_config
from plait.data.batch import Batch
from plait.models.model import Model
from plait.tokenizers.load import load_tokenizer
from plait.training.distributed import World, spread
from plait.training.objectives import make_objective
from plait.training.optimizers import Optimizer
from plait.training.precision import DTYPES, LossScaler, autocast
from plait.training.step import train_step
from plait.training.wrap import compile_blocks, recompute_blocks

DEFAULTS = {
    "cpu": (("mamba-70m", "mamba2-70m", "transformer-70m"), ((1, 256), (1, 512), (1, 2048))),
    "cuda": (("mamba-370m", "mamba2-370m", "transformer-370m"), ((16, 2048), (4, 8192), (1, 32768))),
}
"""Models, and (sequences, tokens of each)."""

Step = Callable[[], float]
Maker = Callable[[], tuple[Step, int, str]]


def benchmark_training(
    device: torch.device,
    *,
    models: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    precision: str | None = None,
    compiled: bool = False,
    checkpointing: str = "none",
    peers: bool = True,
    seconds: float = 10.0,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Result:
    """Time the named models at (sequences, tokens of each); ``say`` is given each row as it comes.

    precision: fp32, bf16 or fp16; None: bf16 on a GPU, else fp32. compiled, checkpointing: as ``training.compile`` and
    ``training.activation_checkpointing``. peers: also models of other packages, where installed.
    """
    own_models, own_sizes = DEFAULTS[device.type]
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    result = Result("train", str(device))
    names = list(models or own_models)
    for name in names:
        split_name(name)  # a mistake is told before anything is measured
    for name in names:
        for row in _checked(
            name, sizes or own_sizes, device, precision, compiled, checkpointing, peers, seconds
        ):
            result.rows.append(row)
            say(row)
    return result


def _checked(
    name: str,
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    precision: str,
    compiled: bool,
    checkpointing: str,
    peers: bool,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Rows of one model; one row that says so if it computes wrong."""
    try:
        check(name, device, DTYPES.get(precision, torch.float32))
    except Exception as fault:  # whatever a backend does wrong here is one model's, and is reported
        yield {"model": name, "shape": "-", "by": "plait", "precision": precision, "failed": failure(fault)}
        return
    vocabulary = split_name(name)[1].vocabulary
    for size in sizes:
        ids = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
        makers: dict[str, Maker] = {
            "plait": partial(_own, name, ids, device, precision, compiled, checkpointing)
        }
        if peers:
            makers |= training_peers(name, ids, device, precision)
        what = {"model": name, "shape": f"B{size[0]} L{size[1]}", "precision": precision}
        # A GPU holds few models, and is quiet: one after the other. On a CPU they take turns.
        groups = [{label: make} for label, make in makers.items()] if device.type == "cuda" else [makers]
        for group in groups:
            yield from _rows(name, what, group, ids.numel(), device, seconds)


def _rows(
    name: str,
    what: dict[str, Any],
    makers: dict[str, Maker],
    n_tokens: int,
    device: torch.device,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """What these makers' steps take, in one run."""
    ready: list[tuple[dict[str, Any], Step]] = []
    for label, make in makers.items():
        row = {**what, "by": label}
        try:
            measured, step = _first_steps(name, label, make, device)
            ready.append(({**row, **measured}, step))
        except Exception as fault:  # as above
            yield {**row, "failed": failure(fault)}
    steps = [step for _, step in ready]
    if device.type == "cuda":
        timings = [steady(step, device, seconds=seconds) for step in steps]
    else:
        timings = measure_together(steps, device, seconds=seconds, least=2) if steps else []
    for (row, _), timing in zip(ready, timings, strict=True):
        rate = 1000 * n_tokens / timing.median
        yield {**row, "step_ms": timing.median, "tokens_per_second": rate, "repeats": timing.n}


def _first_steps(name: str, label: str, make: Maker, device: torch.device) -> tuple[dict[str, Any], Step]:
    """Build, take the first step, which compiles what is not compiled yet, and one to look at the memory."""
    before = in_use(device)
    step, parameters, ran = make()
    begin = time.perf_counter()
    first = step()
    wait(device)
    seconds = time.perf_counter() - begin
    if label == "plait":
        check_loss(name, first)
    peak = peak_of(step, device, before)
    return {
        "parameters": parameters,
        "first_step_s": seconds,
        "first_loss": first,
        "peak_gib": None if peak is None else peak / 2**30,
        **ran_by(ran),
    }, step


def _own(
    name: str, ids: Tensor, device: torch.device, precision: str, compiled: bool, checkpointing: str
) -> tuple[Step, int, str]:
    """(a step that returns its loss, parameters, kernels) of Plait."""
    options = {"precision": precision, "lr": 1e-4, "warmup": 0}
    config = load_config({"model": model_config(name).model_dump(exclude_unset=True), "training": options})
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
    if compiled:
        compile_blocks(model.blocks)
    recompute_blocks(model.blocks, checkpointing)
    world = World(0, 1, device)
    forward = spread(model, list(model.blocks), "replicate", world)
    optimizer, scaler = Optimizer(model, config.training), LossScaler(precision)
    optimizer.set_lr(1.0)
    n_targets = ids.shape[0] * (ids.shape[1] - 1)
    batch = Batch(ids, ids, n_tokens=ids.numel(), n_targets=n_targets)

    def step() -> float:
        update = train_step(forward, objective, optimizer, [batch], n_targets, config.training, scaler, world)
        return update.loss

    return step, sum(p.numel() for p in model.parameters()), ran
