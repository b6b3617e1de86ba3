"""The keyed permutation: a bijection, that looks shuffled, that differs by key, and never changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data.permutation import Permutation, key_of, uniform, words

FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@FEW
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_it_is_a_bijection(n: int, key: int) -> None:
    order = Permutation(n, key)(np.arange(n))
    assert sorted(order.tolist()) == list(range(n))


def test_places_can_be_asked_for_alone() -> None:
    order = Permutation(10**12, 5)
    places = np.array([0, 1, 10**12 - 1])
    assert [int(order(int(i))) for i in places] == order(places).tolist()
    assert order(places).min() >= 0 and order(places).max() < 10**12
    assert order(places.reshape(3, 1)).shape == (3, 1)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_every_index_goes_everywhere_equally_often(n: int) -> None:
    keys = 4000
    table = np.zeros((n, n))
    for key in range(keys):
        table[np.arange(n), Permutation(n, key_of(key))(np.arange(n))] += 1
    expected = keys / n
    chi2 = ((table - expected) ** 2 / expected).sum()
    free = (n - 1) ** 2
    assert chi2 < free + 5 * np.sqrt(2 * free) + 5


def test_neighbours_and_epochs_are_unrelated() -> None:
    n = 4096
    orders = [Permutation(n, key_of(0, epoch))(np.arange(n)) for epoch in range(4)]
    for order in orders:
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.08
        assert (np.abs(np.diff(order)) == 1).sum() < 20
        assert (order == np.arange(n)).sum() < 8
        steps = Counter(np.diff(order).tolist())
        assert steps.most_common(1)[0][1] < 12
    for a in range(4):
        for b in range(a):
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.08
            assert (orders[a] == orders[b]).sum() < 10


def test_uniform_is_uniform_and_a_pure_function() -> None:
    draws = uniform(key_of(1, 2, 3), 20_000)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.std() - 12**-0.5) < 0.005
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.03
    assert uniform(key_of(1, 2, 3), 5).tolist() == draws[:5].tolist()
    keys = {key_of(*numbers) for numbers in [(), (0,), (0, 0), (1, 2), (2, 1), (-1,), (1, 2, 0), (2**64,)]}
    assert len(keys) == 7  # 2**64 is 0 modulo 2**64


def test_known_answers() -> None:
    """Saved runs resume with these numbers; they may never change."""
    assert key_of(0, 1, 2) == 16434261255821208195
    assert words(0, 2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # splitmix64 of seed 0
    assert Permutation(10, 7)(np.arange(10)).tolist() == [1, 7, 4, 6, 5, 3, 9, 0, 2, 8]
