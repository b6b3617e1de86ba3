"""Sampling: each rule against a plain loop over one row, and the draws against the probabilities themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from plait.config.errors import ConfigError
from plait.inference.sampling import (
    INVALID,
    Sampling,
    Uniforms,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize,
    sample,
    shape_distribution,
)


def logits_of(n_rows: int, vocab: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n_rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(row: list[float], s: Sampling) -> list[float]:
    """Probabilities of one row, rule after rule, in Python."""
    p = {i: math.exp((x - max(row)) / s.temperature) for i, x in enumerate(row)}
    total = sum(p.values())
    p = {i: x / total for i, x in p.items()}
    order = sorted(p, key=lambda i: -p[i])
    kept = order if s.top_k is None else order[: s.top_k]
    total = sum(p[i] for i in kept)
    if s.top_p is not None:
        reached, nucleus = 0.0, []
        for i in kept:
            if reached < s.top_p:
                nucleus.append(i)
            reached += p[i] / total
        kept = nucleus
    if s.min_p is not None:
        kept = [i for i in kept if p[i] >= s.min_p * p[kept[0]]]
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(row))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    list(
        itertools.product((0.3, 1.0, 2.5), (None, 1, 4, 100), (None, 0.1, 0.7, 1.0), (None, 0.0, 0.05, 1.0))
    ),
)
def test_rules_in_their_order_equal_a_loop_over_each_row(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    s = Sampling(temperature, top_k, top_p, min_p)
    logits = logits_of(5, 23)
    ours = shape_distribution(logits, s).softmax(-1)
    theirs = torch.tensor([by_hand(row, s) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_min_p_takes_each_rows_own_maximum() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9, -9.0], [2.0, 0.0, -9.0, 1.9]])
    kept = keep_min_p(logits, 0.5).isfinite()
    assert kept.tolist() == [[False, True, True, False], [True, False, False, True]]


def test_the_penalty_makes_seen_tokens_less_probable_on_both_sides_of_zero() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_top_k_keeps_no_more_than_k_of_equal_logits_and_bears_more_than_there_are() -> None:
    assert keep_top_k(torch.zeros(2, 9), 3).isfinite().sum(-1).tolist() == [3, 3]
    assert keep_top_k(torch.zeros(2, 9), 10**9).isfinite().all()


def test_top_p_always_keeps_the_most_probable_token() -> None:
    logits = logits_of(4, 9)
    kept = keep_top_p(logits, 1e-30).isfinite()
    assert kept.sum(-1).tolist() == [1] * 4 and kept.int().argmax(-1).equal(logits.argmax(-1))


def test_draws_have_the_probabilities_of_the_logits() -> None:
    row = logits_of(1, 12)
    n = 20_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = draw(row.expand(n, -1), grid).bincount(minlength=12)
    assert (counts - n * row.softmax(-1)[0]).abs().max() <= 1.0 + 1e-6


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_draw_gives_a_token_that_was_ruled_out(u: float, dtype: torch.dtype) -> None:
    logits = torch.full((50, 5000), -torch.inf, dtype=dtype)
    allowed = torch.arange(50) * 97 % 4000 + 500
    logits[torch.arange(50), allowed] = 1.0
    logits[torch.arange(50), allowed + 3] = -1.0
    ids = draw(logits, torch.full((50,), u, dtype=torch.float64))
    assert ((ids == allowed) | (ids == allowed + 3)).all()
    assert ids.equal(allowed + 3 if u > 0.9 else allowed)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-37, 1e-4])
def test_cold_is_greedy(temperature: float) -> None:
    logits = 100 * logits_of(8, 40).float()
    uniform = torch.full((8,), 0.999)
    assert sample(logits, Sampling(temperature), uniform=uniform).equal(logits.argmax(-1))


def test_sums_that_are_not_monotone_do_not_raise_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, 30), -torch.inf)
    logits[0, [10, 20]] = 0.0
    cumsum = Tensor.cumsum
    ripple = 1e-12 * (torch.arange(30) % 2)  # as a sum in parallel blocks may have
    monkeypatch.setattr(Tensor, "cumsum", lambda x, *a, **k: cumsum(x, *a, **k) + ripple)
    assert draw(logits, torch.tensor([0.5], dtype=torch.float64)).tolist() == [20]


def test_half_precision_logits_are_rounded_no_further() -> None:
    logits = logits_of(1, 50).bfloat16().expand(5000, -1)
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    ours = sample(logits, Sampling(0.7), uniform=uniform)
    assert ours.equal(sample(logits.float(), Sampling(0.7), uniform=uniform))


def test_a_large_vocabulary_in_half_precision_is_reached_to_its_end() -> None:
    logits = torch.zeros(1, 3000, dtype=torch.bfloat16)  # bfloat16 sums of 1/3000 stop growing at 1/4
    ids = [int(sample(logits, Sampling(), uniform=torch.tensor([u]))) for u in (0.0, 0.5, 0.9999)]
    assert ids == [0, 1500, 2999]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("s", [Sampling(), Sampling(0.0), Sampling(1.0, 2, 0.5, 0.1)])
def test_a_row_that_is_not_finite_gives_no_token_and_the_others_theirs(bad: float, s: Sampling) -> None:
    logits = logits_of(3, 7)
    uniform = torch.full((3,), 0.3)
    right = sample(logits, s, uniform=uniform)
    logits[1, 4] = bad
    ids = sample(logits, s, uniform=uniform)
    assert ids[1] == INVALID and ids[[0, 2]].equal(right[[0, 2]])


def test_a_rows_numbers_do_not_depend_on_the_batch() -> None:
    together, alone, kept = Uniforms([3, 4, 5]), Uniforms([4]), Uniforms([3, 4])
    for step in range(150):
        if step == 70:
            kept.keep([1])
        numbers = together.next()
        assert numbers[1] == alone.next()[0] == kept.next()[-1]
        assert len(set(numbers.tolist())) == 3 and numbers.min() >= 0 and numbers.max() < 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_that_make_no_sense_are_named(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{option} is .*; it must be"):
        Sampling(**{option: value})  # type: ignore[arg-type]
