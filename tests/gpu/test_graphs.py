"""On a GPU: recorded decoding steps replay what runs unrecorded, bit for bit, and never wait for the device.

Run with ``pytest -m gpu tests/gpu``.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from plait.inference import graphs
from plait.inference.decoding import decode, prefill
from plait.inference.graphs import StepGraphs
from plait.inference.sampling import Sampling, sample
from plait.models.linear_loss import linear_cross_entropy
from plait.models.loss import cross_entropy
from tests.inference.helpers import PATTERNS, make_model, tokens
from tests.invariants import rms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEPS = 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_replay_is_the_step_bit_for_bit_and_never_waits(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype=dtype).cuda()
    caches = [model.new_cache(3, 140) for _ in range(2)]
    for cache in caches:
        prefill(model, tokens(2, 9, 50), cache)
    held = [t for s in caches[0].states for t in s.values()] + [caches[0].positions]
    addresses = [t.data_ptr() for t in held]
    ids = torch.randint(61, (STEPS, 3), generator=torch.Generator().manual_seed(0)).cuda()
    step = StepGraphs(model, caches[0])
    ours = [step(ids[0]).clone()]
    expected = [decode(model, ids[0], caches[1])]
    for number in range(1, STEPS):
        recorded = caches[0].max_past in step.bounds or step.bounds == [0]
        if recorded:  # what follows only replays
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours.append(step(ids[number]).clone())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected.append(decode(model, ids[number], caches[1]))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert addresses == [t.data_ptr() for t in held]
    for a, b in zip(caches[0].states, caches[1].states, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert caches[0].lengths == caches[1].lengths and torch.equal(caches[0].positions, caches[1].positions)


@pytest.mark.parametrize("name", PATTERNS)
def test_greedy_generation_is_that_of_a_cpu(name: str) -> None:
    model, prompts = make_model(name, dtype=torch.float32), tokens(7, 1, 30, 66)
    options = {"max_new_tokens": 40, "temperature": 0}
    expected = model.generate(prompts, **options)
    graphs.say_why_not.cache_clear()
    model.cuda()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without recorded steps")
        assert model.generate(prompts, **options) == expected
    assert model.generate(prompts, **options, graphs=False) == expected


def test_sampling_after_a_replay_does_not_wait() -> None:
    model = make_model("hybrid", dtype=torch.float32).cuda()
    cache = model.new_cache(2, 60)
    prefill(model, tokens(3, 3), cache)
    step, sampling = StepGraphs(model, cache), Sampling(temperature=0.7, top_k=20, top_p=0.9)
    ids, uniform = torch.tensor([1, 2]).cuda(), torch.rand(2, dtype=torch.float64).cuda()
    ids = sample(step(ids), sampling, uniform=uniform)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            ids = sample(step(ids.clamp(min=0)), sampling, uniform=uniform)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((ids >= 0).all())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_loss_in_chunks_is_that_of_all_logits(kind: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(700, 64), (1000, 64), (1000,)]
    x, w, b = (torch.randn(s, generator=g).cuda().requires_grad_() for s in shapes)
    targets = torch.randint(1000, (700,), generator=g).cuda()
    targets[::5] = -100

    def plain() -> Tensor:
        return cross_entropy(torch.nn.functional.linear(x, w, b), targets)[0]

    true = torch.autograd.grad(plain(), [x, w, b])
    with torch.autocast("cuda", kind):
        loss, _ = linear_cross_entropy(x, w, b, targets, chunk=128)
        expected = plain()
    assert abs(float((loss / expected).detach()) - 1) < 1e-5
    for ours, exact in zip(torch.autograd.grad(loss, [x, w, b]), true, strict=True):
        assert rms(ours, exact) < 1e-2
