"""Which steps of a run are saved and kept: the steps that ``training.checkpoint_schedule`` describes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from plait.config.timetable import CheckpointSchedule

_SHARE = 10  # linear spacing without an interval: a tenth


@dataclass(frozen=True)
class Epochs:
    """How long epochs are: ``rows`` of data, ``batch_rows`` of them in a step."""

    rows: int
    batch_rows: int

    def end(self, epoch: int) -> int:
        """The first step after which ``epoch`` epochs (1, 2, ...) are through."""
        return -(-epoch * self.rows // self.batch_rows)

    def at(self, step: int) -> float:
        """How many epochs are through after a step."""
        return step * self.batch_rows / self.rows


def scheduled_steps(schedule: CheckpointSchedule, steps: int, epochs: Epochs) -> list[int]:
    """The steps, rising, of a run of ``steps`` whose checkpoints are kept; those beyond its end are left out."""
    found = set(schedule.steps)
    forms = schedule.spacing != "none" or schedule.by_epoch
    if schedule.spacing != "none":
        found |= set(_apart(_spaced(schedule, schedule.spacing, 0, steps, 1), 0, schedule.min_interval))
    if schedule.first_epoch:
        end = min(steps, epochs.end(1))
        count = schedule.first_epoch
        found |= {end} if count == 1 else {round(i * end / (count - 1)) for i in range(count)}
    if schedule.later_epochs != "none":
        found |= _later(schedule, steps, epochs)
    if forms:
        found.add(steps)
    return sorted(step for step in found if step <= steps)


def _later(schedule: CheckpointSchedule, steps: int, epochs: Epochs) -> set[int]:
    """Of every epoch but the first: the spaced steps, or enough even ones, and its end."""
    found: set[int] = set()
    epoch = 1
    while (start := epochs.end(epoch)) < steps:
        epoch += 1
        end = min(steps, epochs.end(epoch))
        inside = _apart(
            _spaced(schedule, schedule.later_epochs, start, end, schedule.base), start, schedule.min_interval
        )
        if len(inside) < schedule.min_per_epoch:
            count = min(schedule.min_per_epoch, end - start - 1)
            inside = [start + (i * (end - start)) // (count + 1) for i in range(1, count + 1)]
        found |= {*inside, end}
    return found


def _spaced(
    schedule: CheckpointSchedule, how: str, start: int, end: int, first_offset: float
) -> Iterator[int]:
    """Steps strictly between start and end: at equal distances, or at offsets that grow by the base."""
    if how == "linear":
        interval = schedule.interval or max(1, (end - start) // _SHARE)
        yield from range(start + interval, end, interval)
        return
    offset = first_offset
    while start + round(offset) < end:
        yield start + round(offset)
        offset *= schedule.base


def _apart(steps: Iterable[int], start: int, least: int) -> list[int]:
    """The steps that are at least ``least`` after the one kept before (and after ``start``)."""
    kept, before = [], start
    for step in steps:
        if step - before >= least:
            kept.append(step)
            before = step
    return kept
