"""Schedules are pure functions of progress; warmup comes before, time may lead."""

from __future__ import annotations

import pytest

from plait.config.training import TrainingConfig
from plait.training.schedules import SCHEDULES, decay_scale, lr_scale, muon_momentum, progress_of


def scales(steps: int = 100, **training: object) -> list[float]:
    config = TrainingConfig.model_validate({"min_lr_ratio": 0.1, "warmup": 0, **training})
    return [lr_scale(config, steps, step, progress_of(step, steps)) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("name", "start", "middle", "end"),
    [("constant", 1, 1, 1), ("linear", 1, 0.55, 0.1), ("cosine", 1, 0.55, 0.1), ("wsd", 1, 1, 0.1)],
)
def test_the_shapes(name: str, start: float, middle: float, end: float) -> None:
    found = scales(schedule=name)
    assert [found[0], found[50], found[100]] == pytest.approx([start, middle, end])
    assert all(0.1 - 1e-9 <= x <= 1 for x in found)
    assert found == sorted(found, reverse=True)


def test_wsd_goes_down_in_its_last_share() -> None:
    found = scales(schedule="wsd", decay_fraction=0.25, min_lr_ratio=0.0)
    assert found[75] == 1 and found[76] < 1 and found[100] == 0
    warmed = scales(schedule="wsd", decay_fraction=0.25, min_lr_ratio=0.0, warmup=0.5)
    assert warmed[75:] == pytest.approx(found[75:])


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (10, 10), (1, 1)])
def test_warmup_by_share_and_by_steps(warmup: float, steps: int) -> None:
    found = scales(schedule="constant", warmup=warmup)
    assert found[:steps] == pytest.approx([(step + 1) / steps for step in range(steps)])
    assert found[steps:] == [1.0] * (101 - steps)


def test_what_follows_the_warmup_begins_at_its_beginning() -> None:
    found = scales(schedule="cosine", warmup=0.5)
    assert (
        found[50] == pytest.approx(1)
        and found[75] == pytest.approx(0.55)
        and found[100] == pytest.approx(0.1)
    )
    assert scales(schedule="cosine", warmup=1000)[100] == pytest.approx(0.101)


def test_progress_is_the_larger_of_steps_and_time() -> None:
    assert progress_of(25, 100) == 0.25
    assert progress_of(25, 100, elapsed=30.0, minutes=1.0) == 0.5
    assert progress_of(75, 100, elapsed=30.0, minutes=1.0) == 0.75
    assert progress_of(0, 100, elapsed=90.0, minutes=1.0) == 1.0


def test_every_schedule_of_the_config_exists() -> None:
    for name in ("constant", "linear", "cosine", "wsd"):
        assert name in SCHEDULES and TrainingConfig.model_validate({"schedule": name}).schedule == name


def test_nanochats_rates_over_a_run() -> None:
    """October 2025: no warmup, flat, the last fifth down to zero in a straight line."""
    found = scales(schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.0, warmup=0)
    assert found[:81] == pytest.approx([1.0] * 81)
    assert found[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 101)])


def test_decay_goes_down_if_asked() -> None:
    def decays(name: str) -> list[float]:
        config = TrainingConfig.model_validate({"weight_decay_schedule": name})
        return [decay_scale(config, progress) for progress in (0.0, 0.25, 0.5, 1.0)]

    assert decays("constant") == [1.0] * 4
    assert decays("linear") == [1.0, 0.75, 0.5, 0.0]
    assert decays("cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.0])


def test_muons_momentum_rises_and_may_fall() -> None:
    def momenta(steps: int = 1000, **muon: float) -> list[float]:
        config = TrainingConfig.model_validate({"muon": muon, "decay_fraction": 0.2})
        return [muon_momentum(config, step, step / steps) for step in (0, 150, 300, 800, 900, 1000)]

    assert momenta() == [0.95] * 6
    assert momenta(momentum_start=0.85) == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.95, 0.95])
    both = momenta(momentum=0.97, momentum_start=0.85, momentum_warmup=400, momentum_end=0.9)
    assert both == pytest.approx([0.85, 0.895, 0.94, 0.97, 0.935, 0.9])
