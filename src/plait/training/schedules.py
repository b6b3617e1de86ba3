"""What changes in a run: learning rate, weight decay, Muon's momentum, sequence length.

Pure functions of progress in [0, 1]: progress, not the step, is the argument, so the same schedule follows a
number of steps or a wall-clock budget, and a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from plait.config.training import TrainingConfig


def constant(progress: float, floor: float, decay_fraction: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float, floor: float, decay_fraction: float) -> float:
    """From 1 down to ``floor`` in a straight line."""
    return 1.0 - (1.0 - floor) * progress


def cosine(progress: float, floor: float, decay_fraction: float) -> float:
    """From 1 down to ``floor`` along half a cosine (arXiv 1608.03983)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(progress: float, floor: float, decay_fraction: float) -> float:
    """1, then over the last ``decay_fraction`` down to ``floor`` in a straight line (warmup-stable-decay)."""
    left = (1.0 - progress) / decay_fraction
    return floor + (1.0 - floor) * min(1.0, left)


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}


def progress_of(step: int, steps: int, elapsed: float = 0.0, minutes: float | None = None) -> float:
    """How much of a run is done before update ``step`` (from 0): the larger share of steps and of time."""
    share = step / steps
    if minutes is not None:
        share = max(share, elapsed / (60.0 * minutes))
    return min(1.0, share)


def lr_scale(config: TrainingConfig, steps: int, step: int, progress: float) -> float:
    """The factor of the peak learning rate for update ``step`` of ``steps``, ``progress`` into the run.

    A warmup below 1 is a share of the run, otherwise a number of steps; it begins above zero. What follows
    it is the schedule from its beginning; ``decay_fraction`` is a share of the whole run.
    """
    if config.warmup >= 1:
        share = min(1.0, config.warmup / steps)
        rise = (step + 1) / config.warmup
    else:
        share = float(config.warmup)
        rise = (progress + 1.0 / steps) / share if share else 1.0
    if share >= 1.0:
        return min(1.0, rise)
    after = max(0.0, (progress - share) / (1.0 - share))
    decay = min(1.0, config.decay_fraction / (1.0 - share))
    return min(1.0, rise) * SCHEDULES[config.schedule](after, config.min_lr_ratio, decay)


def decay_scale(config: TrainingConfig, progress: float) -> float:
    """The factor of the matrices' weight decay."""
    if config.weight_decay_schedule == "constant":
        return 1.0
    return SCHEDULES[config.weight_decay_schedule](progress, 0.0, 1.0)


def muon_momentum(config: TrainingConfig, step: int, progress: float) -> float:
    """Muon's momentum for update ``step`` (from 0): it may rise at first, and go to another value at the end."""
    muon = config.muon
    if muon.momentum_start is not None and step < muon.momentum_warmup:
        return muon.momentum_start + (muon.momentum - muon.momentum_start) * step / muon.momentum_warmup
    if muon.momentum_end is None:
        return muon.momentum
    ending = max(0.0, 1.0 - (1.0 - progress) / config.decay_fraction)
    return muon.momentum + (muon.momentum_end - muon.momentum) * ending


def sequence_length(config: TrainingConfig, longest: int, progress: float) -> int:
    """Tokens a sequence at this point of the run; ``longest`` is data.sequence_length, its bound and its end."""
    for stage in config.sequence_length_schedule:
        if progress < stage.until:
            return min(stage.length, longest)
    return longest
