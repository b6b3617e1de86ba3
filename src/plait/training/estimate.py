"""What fits into a given memory: the largest micro-batch of training, the most sequences of generation.

Parameters and states are counted, a step's peak is simulated (see memory.py). What the allocator loses between its
blocks is not: glibc keeps up to a quarter more than lives, torch's caching allocator on a GPU a few percent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from plait.config.errors import ConfigError
from plait.config.schema import Config, ModelConfig
from plait.models.model import Model
from plait.training.distributed import choose_device
from plait.training.memory import StepMemory, step_memory

LENGTHS = (512, 1024, 2048, 4096)
MOST_ROWS = 1 << 16
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Fit:
    """At one length: the largest micro-batch of training that fits, and how many sequences can be generated."""

    length: int
    rows: int  # 0: not even one
    peak: int  # bytes of the step with those rows (with one, if none fits)
    state: int | None  # bytes of one sequence's cache; None: the model keeps none
    sequences: int | None  # beside the weights alone


@dataclass(frozen=True)
class Estimate:
    """A config against a memory of ``memory`` bytes, on one process."""

    parameters: int
    length: int
    rows: int  # of the config's own micro-batch
    step: StepMemory
    fits: list[Fit]
    memory: int

    @property
    def enough(self) -> bool:
        """Whether the config trains as it stands."""
        return self.step.peak <= self.memory


def estimate(config: Config, model: ModelConfig, memory: int, lengths: Sequence[int] = LENGTHS) -> Estimate:
    """What of ``config`` fits into ``memory`` bytes at the given lengths and its own; ``model`` has its vocabulary.

    Simulated with the operations that this machine's device runs.
    """
    training, own = config.training, config.data.sequence_length
    device = choose_device(training.device)
    rows = max(1, training.batch_tokens // own)
    micro = rows if training.micro_batch_tokens is None else max(1, training.micro_batch_tokens // own)

    def step(some: int, length: int, *, accumulate: bool) -> StepMemory:
        return step_memory(model, training, some, length, accumulate=accumulate, device=device)

    def peak_of(length: int, some: int) -> int:
        return step(some, length, accumulate=True).peak

    built = Model(model, device="meta")
    count = sum(p.numel() for p in built.parameters())
    fits = []
    for length in sorted({*lengths, own}):
        if model.embedding.position == "learned" and length > model.embedding.max_positions:
            continue
        most, peak = _most_rows(partial(peak_of, length), memory)
        state = None
        if built.stateful:
            state = sum(b.mixer.state_bytes(1, length, torch.float32) for b in built.blocks)
        fits.append(
            Fit(length, most, peak, state, None if not state else max(0, memory - 4 * count) // state)
        )
    return Estimate(count, own, micro, step(micro, own, accumulate=micro < rows), fits, memory)


def _most_rows(peak: Callable[[int], int], memory: int) -> tuple[int, int]:
    """The most rows whose peak fits, and that peak; (0, the peak of one row) if none does.

    The peak grows with the rows, nearly as a straight line, so a few secant steps find the place.
    """
    one = peak(1)
    if one > memory:
        return 0, one
    low, at_low, high, guess = 1, one, MOST_ROWS + 1, 2
    while high - low > 1:
        now = peak(guess)
        slope = (now - one) / (guess - 1)
        if now <= memory:
            low, at_low = guess, now
            if memory - now < slope:
                break
        else:
            high = guess
        step = int((memory - at_low) / slope) if slope else 7 * guess
        guess = min(high - 1, low + max(1, step))
    return low, at_low


def parse_size(text: str) -> int:
    """Bytes of ``12GB``, ``12 GiB``, ``500M``; ConfigError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not an amount of memory; give one like 12GB, 80GiB or 500MB")
    number, unit, binary = match.groups()
    factor = _UNITS[unit.upper()]
    if binary:
        factor = 1024 ** "_KMGT".index(unit.upper()) if unit else 1
    return int(float(number) * factor)
