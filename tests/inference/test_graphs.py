"""Recorded decoding steps, with a recorder that needs no GPU: what is recorded, when, and that numbers are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plait.config.errors import CapacityError
from plait.inference import decoding, graphs
from plait.inference.decoding import decode, prefill
from plait.inference.graphs import StepGraphs, usable
from plait.mixers.constants import Table, constant, decay_rates, held
from tests.inference.helpers import PATTERNS, greedy_by_hand, make_model, tokens


class Recorder:
    """Records a function by keeping it; like a graph, it runs with the host's numbers of when it was recorded."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            function()

        return replay


@pytest.mark.parametrize("name", PATTERNS)
def test_recorded_steps_are_the_steps(name: str) -> None:
    model, recorder = make_model(name), Recorder()
    caches = [model.new_cache(3, 150) for _ in range(2)]
    for cache in caches:
        prefill(model, tokens(0, 3, 50), cache)
    addresses = [t.data_ptr() for s in caches[0].states for t in s.values()] + [
        caches[0].positions.data_ptr()
    ]
    step = StepGraphs(model, caches[0], recorder)
    buffers = set()
    for number in range(90):
        ids = torch.tensor([number % 61, 60 - number % 61, 7])
        ours = step(ids)
        buffers.add(ours.data_ptr())
        assert torch.equal(ours, decode(model, ids, caches[1])), number
    assert caches[0].lengths == caches[1].lengths == [90, 93, 140]
    assert torch.equal(caches[0].positions, caches[1].positions)
    for ours, theirs in zip(caches[0].states, caches[1].states, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(buffers) == 1
    assert addresses == [t.data_ptr() for s in caches[0].states for t in s.values()] + [
        caches[0].positions.data_ptr()
    ]
    attends = any("attention" in variant for variant in PATTERNS[name])
    assert step.bounds == ([64, 128, 150] if attends and "window" not in name else step.bounds)
    assert recorder.recorded == len(step.bounds) <= 3 and recorder.replayed == 90
    if not attends:
        assert step.bounds == [0]


def test_the_cache_may_take_other_calls_in_between() -> None:
    model = make_model("hybrid")
    caches = [model.new_cache(2, 100) for _ in range(2)]
    step = StepGraphs(model, caches[0], Recorder())
    ids = torch.tensor([5, 6])
    for _ in range(2):
        for cache in caches:
            prefill(model, tokens(4, 9), cache)
        assert torch.equal(step(ids), decode(model, ids, caches[1]))


def test_a_full_cache_raises_before_anything_is_written() -> None:
    model = make_model("hybrid")
    cache = model.new_cache(2, 10)
    prefill(model, tokens(3, 9), cache)
    step = StepGraphs(model, cache, Recorder())
    step(torch.tensor([1, 2]))
    before = cache.clone()
    with pytest.raises(CapacityError, match="sequence 1"):
        step(torch.tensor([1, 2]))
    assert cache.lengths == before.lengths
    assert all(torch.equal(a[k], b[k]) for a, b in zip(cache.states, before.states, strict=True) for k in a)


OPTIONS = {"max_new_tokens": 40, "temperature": 0.8, "seed": 1, "num_samples": 2}


@pytest.mark.parametrize("name", ["hybrid", "mamba"])
def test_generation_records_each_batch_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_model(name), tokens(7, 1, 30)
    expected = model.generate(prompts, **OPTIONS, graphs=False)
    ends = {"eos_token_id": expected[0][20]}
    shorter = model.generate(prompts, **OPTIONS, **ends, graphs=False)
    recorder = Recorder()
    monkeypatch.setattr(graphs, "capture_on", lambda device: recorder)
    monkeypatch.setattr(decoding, "usable", lambda model, steps: True)
    assert model.generate(prompts, **OPTIONS) == expected
    assert recorder.replayed == 39 and recorder.recorded == (2 if name == "hybrid" else 1)
    assert model.generate(prompts, **OPTIONS, **ends) == shorter
    before = recorder.replayed
    assert model.generate(prompts, **OPTIONS, graphs=False) == expected
    assert recorder.replayed == before


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_model("gru"), tokens(7, 1)
    expected = model.generate(prompts, **OPTIONS, graphs=False)

    def refuse(function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(graphs, "capture_on", lambda device: refuse)
    monkeypatch.setattr(decoding, "usable", lambda model, steps: True)
    graphs.say_why_not.cache_clear()
    with pytest.warns(
        UserWarning, match="without recorded steps.*operation not permitted when stream"
    ) as said:
        assert model.generate(prompts, **OPTIONS) == expected
        assert model.generate(prompts, **OPTIONS) == expected
    assert len(said) == 1


def test_steps_are_recorded_where_that_is_possible() -> None:
    assert usable(make_model("mamba"), 1000) and not usable(make_model("mamba").to("meta"), 1000)


def test_constants_are_held_while_decoding_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    table: Table = {}
    with torch.no_grad(), held(table):
        first = constant(weight, decay_rates)
        assert constant(weight, decay_rates) is first and torch.equal(first, -weight.exp())
        weight.add_(1)
        assert constant(weight, decay_rates) is first  # what the caller promised not to do
        with torch.enable_grad():
            assert constant(weight, decay_rates).requires_grad
        with held({}):
            assert torch.equal(constant(weight, decay_rates), -weight.exp())
    with torch.no_grad():
        assert torch.equal(constant(weight, decay_rates), -weight.exp())


def test_another_generation_sees_other_weights() -> None:
    model, prompts = make_model("mamba"), tokens(7)
    options = {"max_new_tokens": 30, "temperature": 0}
    before = model.generate(prompts, **options)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.A_log.add_(2)
    changed = model.generate(prompts, **options)
    assert changed != before
    assert changed == [greedy_by_hand(model, prompts[0], 30)]
