"""Which steps are saved and kept: given, spaced over the run, or by epoch; and that a run does it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.config.errors import ConfigError
from plait.config.timetable import CheckpointSchedule
from plait.data.prepare import open_data
from plait.formats.folders import checkpoint_step, list_checkpoints
from plait.tokenizers.bytes import BytesTokenizer
from plait.training import train
from plait.training.timetable import Epochs, scheduled_steps
from tests.training import runs

EVEN = Epochs(rows=1000, batch_rows=3)  # the first epoch is through after step 334, the second after 667
NONE = Epochs(rows=1, batch_rows=1)


def steps_of(steps: int, epochs: Epochs = NONE, /, **schedule: Any) -> list[int]:
    return scheduled_steps(CheckpointSchedule.model_validate(schedule), steps, epochs)


def test_epochs_end_when_their_last_row_is_through() -> None:
    assert [EVEN.end(k) for k in (1, 2, 3)] == [334, 667, 1000]
    assert EVEN.at(500) == 1.5
    small = Epochs(rows=10, batch_rows=4)
    assert [small.end(k) for k in (1, 2, 3, 4)] == [3, 5, 8, 10]


def test_nothing_is_scheduled_unless_asked_for() -> None:
    assert steps_of(100) == []


def test_given_steps_are_taken_as_they_are() -> None:
    assert steps_of(100, steps=[40, 0, 7, 7, 101, 100]) == [0, 7, 40, 100]
    assert CheckpointSchedule.model_validate([3, 5]).steps == [3, 5]
    with pytest.raises(ConfigError, match="a step is 0 or more; got -1"):
        CheckpointSchedule(steps=[4, -1])


def test_over_the_run() -> None:
    assert steps_of(100, spacing="linear", interval=30) == [30, 60, 90, 100]
    assert steps_of(100, spacing="linear") == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert steps_of(100, spacing="log") == [1, 2, 4, 8, 16, 32, 64, 100]
    assert steps_of(50, spacing="log", base=1.5) == [1, 2, 3, 5, 8, 11, 17, 26, 38, 50]
    assert steps_of(100, spacing="log", min_interval=10) == [16, 32, 64, 100]
    assert steps_of(100, spacing="log", steps=[0, 50]) == [0, 1, 2, 4, 8, 16, 32, 50, 64, 100]


def test_the_first_epoch_is_even_from_its_beginning_to_its_end() -> None:
    assert steps_of(1000, EVEN, first_epoch=5) == [0, 84, 167, 250, 334, 1000]
    assert steps_of(1000, EVEN, first_epoch=1) == [334, 1000]
    assert len(steps_of(1000, EVEN, first_epoch=20)) == 21
    assert steps_of(100, EVEN, first_epoch=3) == [0, 50, 100], "a run that ends within its first epoch"


def test_later_epochs_grow_from_their_own_beginning() -> None:
    found = steps_of(1000, EVEN, later_epochs="log")
    second = [334 + offset for offset in (2, 4, 8, 16, 32, 64, 128, 256)]
    third = [667 + offset for offset in (2, 4, 8, 16, 32, 64, 128, 256)]
    assert found == [*second, 667, *third, 1000]
    tens = steps_of(1000, EVEN, later_epochs="log", base=10)
    assert tens == [344, 434, 667, 677, 767, 1000]


def test_later_epochs_at_equal_distances() -> None:
    assert steps_of(1000, EVEN, later_epochs="linear", interval=100) == [
        434,
        534,
        634,
        667,
        767,
        867,
        967,
        1000,
    ]
    found = steps_of(1000, EVEN, later_epochs="linear")  # a tenth of 333 steps
    assert found[:4] == [367, 400, 433, 466] and 667 in found


def test_spacing_keeps_its_distance_and_its_number() -> None:
    """A least distance thins out; where that leaves too few, even steps stand in, which have their own distance."""
    thin = steps_of(667, EVEN, later_epochs="log", min_interval=100)
    assert thin == [334 + 128, 334 + 256, 667]
    enough = steps_of(667, EVEN, later_epochs="log", min_interval=100, min_per_epoch=5)
    assert enough == [389, 445, 500, 556, 611, 667]
    assert len({b - a for a, b in pairwise([334, *enough])}) == 2, "even but for rounding"
    short = Epochs(rows=4, batch_rows=1)
    assert steps_of(8, short, later_epochs="log", min_per_epoch=50) == [5, 6, 7, 8]


def test_an_epoch_that_is_cut_short_ends_with_the_run() -> None:
    assert steps_of(500, EVEN, later_epochs="log") == [336, 338, 342, 350, 366, 398, 462, 500]


SCHEDULES = st.fixed_dictionaries(
    {
        "steps": st.lists(st.integers(0, 300), max_size=4),
        "spacing": st.sampled_from(["none", "linear", "log"]),
        "first_epoch": st.integers(0, 12),
        "later_epochs": st.sampled_from(["none", "linear", "log"]),
        "interval": st.none() | st.integers(1, 60),
        "base": st.floats(1.1, 10.0),
        "min_interval": st.integers(1, 30),
        "min_per_epoch": st.integers(0, 9),
    }
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(SCHEDULES, st.integers(1, 250), st.integers(1, 90), st.integers(1, 9))
def test_whatever_is_asked_for(schedule: dict[str, Any], steps: int, rows: int, batch_rows: int) -> None:
    epochs = Epochs(rows, batch_rows)
    found = steps_of(steps, epochs, **schedule)
    assert found == sorted(set(found)) and all(0 <= step <= steps for step in found)
    assert {step for step in schedule["steps"] if step <= steps} <= set(found)
    if schedule["spacing"] != "none" or schedule["first_epoch"] or schedule["later_epochs"] != "none":
        assert found[-1] == steps
    if schedule["later_epochs"] != "none":
        ends = [epochs.end(k) for k in range(1, steps * batch_rows // rows + 2)]
        for start, end in pairwise(end for end in ends if end < steps):
            inside = [step for step in found if start < step < end]
            assert end in found and len(inside) >= min(schedule["min_per_epoch"], end - start - 1)


def kept(run: Path) -> list[int | None]:
    return [checkpoint_step(path) for path in list_checkpoints(run)]


def test_a_run_saves_what_is_scheduled_and_never_removes_it(tmp_path: Path) -> None:
    result = runs.run(
        tmp_path, steps=9, checkpoint_every=2, keep_checkpoints=1, checkpoint_schedule=[0, 1, 5], log_every=9
    )
    assert kept(result.run) == [0, 1, 5, 9], "of those of every second step the newest one stays"


def test_a_run_by_epochs_is_scheduled_by_its_own_rows(tmp_path: Path) -> None:
    result = runs.run(tmp_path, epochs=3, checkpoint_schedule={"first_epoch": 2, "later_epochs": "log"})
    config = runs.tiny(tmp_path)

    rows = open_data(config.data, BytesTokenizer())[0].n_tokens // 32
    assert result.step == -(-3 * rows // 5)
    expected = steps_of(result.step, Epochs(rows, 5), first_epoch=2, later_epochs="log")
    assert kept(result.run) == expected and {0, -(-rows // 5), -(-2 * rows // 5)} < set(expected)


def test_a_run_resumes_from_before_its_first_step_and_keeps_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "keep_checkpoints": 1, "checkpoint_schedule": [0, 2, 4]}
    whole = runs.run(tmp_path / "whole", **options)
    runs.run(tmp_path / "part", **{**options, "checkpoint_schedule": [0, 2]})
    begun = tmp_path / "part" / "run" / "checkpoints" / "step-00000000"
    config = runs.tiny(tmp_path / "part", **options)
    rest = train(config, resume=begun, quiet=True)
    assert kept(rest.run) == kept(whole.run) == [0, 2, 4, 6]
    assert whole.checkpoint is not None and rest.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)
