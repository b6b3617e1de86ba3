"""What a run shows: a live line in a terminal, a plain line now and then elsewhere; the first process only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from plait.training.evaluate import Evaluation

SMOOTHING = 0.9
REFRESHES = 4  # a second


@dataclass(frozen=True)
class Status:
    """One step, as it is shown."""

    step: int
    steps: int | None  # of the whole run; None if its end is a matter of time
    progress: float  # of the run, 0 .. 1: by steps or by time
    loss: float  # nats a target
    bits_per_byte: float | None
    lr: float
    tokens_per_second: float
    elapsed: float  # seconds


class Progress:
    """Shows a run; all methods are silent if ``shown`` is False (other processes, ``quiet``)."""

    def __init__(self, shown: bool = True, console: Console | None = None) -> None:
        self.shown = shown
        self.console = console or Console(file=sys.stderr, highlight=False)
        self._live: Live | None = None
        self._smooth: dict[str, tuple[float, float]] = {}  # name -> (weighted sum, sum of weights)

    def message(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            self.console.print(Text(text), soft_wrap=True)

    def step(self, status: Status, *, line: bool) -> None:
        """A step was made; ``line``: it is one of those that a plain log shows."""
        loss = self._smoothed("loss", status.loss)
        bits = None if status.bits_per_byte is None else self._smoothed("bits", status.bits_per_byte)
        if not self.shown:
            return
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, refresh_per_second=REFRESHES, transient=True)
                self._live.start()
            self._live.update(Text(_line(status, loss, bits), overflow="ellipsis", no_wrap=True))
        elif line:
            self.console.print(Text(_line(status, loss, bits)), soft_wrap=True)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Held-out numbers."""
        self.message(f"step {step}: held out: {describe(result)}")

    def core(self, step: int, record: Mapping[str, Any]) -> None:
        """CORE, and each task's centered score."""
        tasks = ", ".join(f"{name} {score['centered']:.3f}" for name, score in record["tasks"].items())
        self.message(f"step {step}: CORE {record['core']:.4f} ({tasks})")

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """What the model wrote."""
        for prompt, text in samples:
            self.message(f"step {step} sample: {prompt!r} -> {text!r}"[:600])

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:  # give the terminal back
            self._live.stop()
            self._live = None

    def _smoothed(self, name: str, value: float) -> float:
        """The exponential mean of a series so far, without the bias towards its beginning."""
        total, weight = self._smooth.get(name, (0.0, 0.0))
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1.0
        self._smooth[name] = (total, weight)
        return total / weight


class Clock:
    """Seconds of training, those before a resume included, and the recent rate of tokens."""

    def __init__(self, elapsed: float) -> None:
        self._start = time.monotonic() - elapsed
        self._marks: list[tuple[float, int]] = [(time.monotonic(), 0)]

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self._start

    def rate(self, tokens: int) -> float:
        """Tokens a second over the last steps, after ``tokens`` more."""
        now, before = time.monotonic(), self._marks[-1][1]
        self._marks = [*self._marks[-20:], (now, before + tokens)]
        first = self._marks[0]
        return (before + tokens - first[1]) / max(1e-9, now - first[0])

    def pause(self) -> None:
        """What comes next (an evaluation, a checkpoint) is over: it does not count in the rate."""
        self._marks = [(time.monotonic(), 0)]


def describe(result: Evaluation) -> str:
    """An evaluation in words."""
    parts = [f"loss {result.loss:.4f}"]
    if result.bits_per_byte is not None:
        parts.append(f"{result.bits_per_byte:.4f} bits per byte")
    if result.accuracy is not None:
        parts.append(f"{100 * result.accuracy:.1f} % right")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40; from two days on 200000 -> 2.3 days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        days = seconds / 86400
        return f"{days:.1f} days" if days < 10 else f"{days:,.0f} days"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory_bytes() -> int | None:
    """The most memory used so far: of the GPU, if one is in use, else of this process; None if unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if os.name == "nt":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _line(status: Status, loss: float, bits: float | None) -> str:
    left = status.elapsed * (1.0 / status.progress - 1.0) if status.progress > 0 else None
    parts = [
        f"step {status.step}" + (f"/{status.steps}" if status.steps else ""),
        f"{100 * status.progress:.0f} %",
        f"loss {loss:.3f}",
        *([] if bits is None else [f"{bits:.3f} bits/byte"]),
        f"lr {status.lr:.2e}",
        f"{status.tokens_per_second:,.0f} tokens/s",
        duration(status.elapsed),
        *([] if left is None else [f"{duration(left)} left"]),
    ]
    memory = memory_bytes()
    if memory is not None:
        parts.append(f"{memory / 2**30:.1f} GiB")
    return "  ".join(parts)
