"""The chunk maps: every token in one slot of its own sequence's chunks, for any packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.ops.chunks import join, plan_chunks, split, token_map
from tests.ops.helpers import cumulative

many = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@many
@given(
    lengths=st.lists(st.integers(0, 9), max_size=7),
    size=st.integers(1, 6),
    slack=st.integers(0, 20),
)
def test_packed(lengths: list[int], size: int, slack: int) -> None:
    n = sum(lengths)
    cu, longest = cumulative(lengths), max(lengths, default=0)
    # what is cut up says where each number came from: sequence and position, both above 0
    sequence, position = token_map(cu, n)
    x = torch.stack([sequence + 1, position + 1], -1).double().unsqueeze(0).requires_grad_()
    plan = plan_chunks(x, size, cu, longest + slack)
    chunks = split(x, plan)
    want = [
        torch.tensor([[s + 1, p + 1] if p < length else [0, 0] for p in range(k, k + size)])
        for s, length in enumerate(lengths)
        for k in range(0, length, size)
    ]
    assert len(want) <= plan.count <= n // size + len(lengths)
    for got, expected in zip(chunks, want, strict=False):
        assert torch.equal(got, expected.double())
    assert not chunks[len(want) :].any()
    assert torch.equal(join(chunks, plan), x)
    weight = torch.arange(chunks.numel(), dtype=torch.float64).view_as(chunks)
    (grad,) = torch.autograd.grad((chunks * weight).sum(), x)
    assert torch.equal(split(grad, plan), weight.masked_fill(chunks == 0, 0))


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8])
def test_dense(length: int) -> None:
    x = torch.rand(2, length, 3, dtype=torch.float64, requires_grad=True) + 1
    plan = plan_chunks(x, 4)
    chunks = split(x, plan)
    assert chunks.shape == (2 * -(-length // 4), 4, 3)
    assert torch.equal(join(chunks, plan), x)
    assert (chunks != 0).sum() == x.numel()
    if plan.valid is not None:
        assert torch.equal(plan.valid, (chunks != 0).all(-1))
