"""What a run would take, without making it: built on the meta device, nothing allocated, no data read.

Parameters and FLOPs are counted, memory is simulated; time is an estimate and says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from plait.config.errors import PlaitError
from plait.config.schema import Config
from plait.config.words import counted
from plait.models.model import Model
from plait.tokenizers.load import load_tokenizer
from plait.training.distributed import choose_device
from plait.training.horizon import BACKWARD, horizon
from plait.training.memory import step_memory
from plait.training.optimizers import assigned_groups
from plait.training.precision import product_dtype
from plait.training.progress import duration

DEFAULT_VOCABULARY = 8192  # what a tokenizer is trained to when the config does not say
_MEASURE_SECONDS, _MEASURE_WIDTH = 0.3, 1024


@dataclass(frozen=True)
class DryRun:
    """Sizes in bytes, of one process."""

    parameters: dict[str, int]  # by part, with the total
    groups: dict[str, int]  # parameters of each optimizer group
    weights: int
    gradients: int
    optimizer: int
    activations: int  # at the peak of a step, simulated
    cache: int  # for generating one sequence of the training length
    flops_per_step: int
    tokens_per_step: int
    steps: int | None  # None: as many as the epochs of data make
    matmul_rate: float  # FLOPs a second, measured now

    @property
    def fastest(self) -> float | None:
        """Seconds of the whole run if everything went at the rate of a large matrix product."""
        return None if self.steps is None else self.steps * self.flops_per_step / self.matmul_rate

    @property
    def length(self) -> str:
        """How many steps, for people."""
        return "as many steps as the epochs make" if self.steps is None else counted(self.steps, "step")

    @property
    def time(self) -> str:
        """How long it takes, for people."""
        if self.fastest is None:
            return "depends on the data"
        return (
            f"at least {duration(self.fastest)}; small models reach a tenth to a half of that rate, so "
            f"{duration(2 * self.fastest)} to {duration(10 * self.fastest)}"
        )

    def lines(self) -> list[str]:
        """For people."""
        parts = [f"  {name:24} {count:>15,}" for name, count in self.parameters.items()]
        groups = ", ".join(f"{name} {count:,}" for name, count in self.groups.items())
        total = self.weights + self.gradients + self.optimizer + self.activations
        return [
            "parameters",
            *parts,
            f"optimizer groups: {groups}",
            "memory of one process",
            f"  weights                  {size(self.weights):>15}",
            f"  gradients                {size(self.gradients):>15}",
            f"  optimizer                {size(self.optimizer):>15}",
            f"  activations, at the peak {size(self.activations):>15}",
            f"  together                 {size(total):>15}",
            f"cache of one sequence: {size(self.cache)}",
            f"a step: {self.tokens_per_step:,} tokens, {self.flops_per_step:.3g} FLOPs; {self.length}",
            f"measured here: {self.matmul_rate / 1e9:,.0f} GFLOP/s in matrix products",
            f"time (estimate): {self.time}",
        ]


def dry_run(config: Config) -> DryRun:
    """Count and estimate a run of ``config`` on this machine; PlaitError if the model cannot be built."""
    training, length = config.training, config.data.sequence_length
    model_config = config.model
    if model_config.vocab_size is None:
        model_config = model_config.model_copy(update={"vocab_size": _vocabulary(config)})
    model = Model(model_config, device="meta")
    by_group: dict[str, int] = {}
    for name, group in assigned_groups(model, training).items():
        by_group[group.name] = by_group.get(group.name, 0) + model.get_parameter(name).numel()
    rows = max(1, training.batch_tokens // length)
    micro = rows if training.micro_batch_tokens is None else max(1, training.micro_batch_tokens // length)
    passes = 1 + BACKWARD + (0 if training.activation_checkpointing == "none" else 1)
    device = choose_device(training.device)
    memory = step_memory(model_config, training, micro, length, accumulate=micro < rows, device=device)
    steps = horizon(training, model, length, rows, None)
    return DryRun(
        parameters=model.parameter_counts(),
        groups=by_group,
        weights=memory.weights,
        gradients=memory.gradients,
        optimizer=memory.optimizer,
        activations=memory.activations,
        cache=sum(block.mixer.state_bytes(1, length) for block in model.blocks),
        flops_per_step=passes * rows * model.flops(length),
        tokens_per_step=rows * length,
        steps=None if steps is None else steps.steps,
        matmul_rate=matmul_rate(device, product_dtype(training.precision, device)),
    )


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = _MEASURE_SECONDS) -> float:
    """FLOPs a second of a square matrix product, measured for about so many seconds."""
    a = torch.ones(_MEASURE_WIDTH, _MEASURE_WIDTH, device=device, dtype=dtype)
    _finished(a @ a)
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        _finished(a @ a)
        count += 1
    return 2.0 * _MEASURE_WIDTH**3 * count / taken


def size(n_bytes: int) -> str:
    """Bytes in the unit that fits."""
    amount = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{n_bytes} B"
        amount /= 1024
    return f"{amount:.1f} GiB"


def _finished(result: torch.Tensor) -> None:
    result[0, 0].item()  # waits for the device


def _vocabulary(config: Config) -> int:
    try:
        return load_tokenizer(config.tokenizer).vocab_size
    except PlaitError:
        if config.tokenizer.path is not None:
            raise
        return config.tokenizer.vocab_size or DEFAULT_VOCABULARY  # to be trained on the data first
