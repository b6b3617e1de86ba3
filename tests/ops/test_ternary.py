"""Ternary weights and 8-bit activations: by hand, portable against the reference, gradients, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from plait.config.errors import PlaitError
from plait.ops.ternary import int8_rows, ternary_weight
from tests.ops.helpers import assert_same_run, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
BACKENDS = pytest.mark.parametrize("backend", ["portable", "reference"])


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parts=st.sampled_from([None, (12,), (3, 9), (1, 1, 10), (4, 4, 4)]),
    ste=st.sampled_from(["identity", "clipped"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    width=st.sampled_from([1, 2, 7, 32]),
    seed=st.integers(0, 9),
)
def test_weights_against_the_reference(
    parts: tuple[int, ...] | None, ste: str, dtype: torch.dtype, width: int, seed: int
) -> None:
    tensors = {"weight": normal(12, width, dtype=dtype, seed=seed + 50)}
    got, want = (
        run(ternary_weight, tensors, parts=parts, ste=ste, backend=b) for b in ("portable", "reference")
    )
    assert_same_run(got, want, TOLERANCE[dtype])
    assert got.outputs[0].dtype == dtype


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(7,), (1, 24), (3, 5, 12), (2, 3, 1, 9), (0, 4), (2, 0, 4)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 9),
)
def test_activations_against_the_reference(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    tensors = {"x": normal(*shape, dtype=dtype, seed=seed + 50)}
    got, want = (run(int8_rows, tensors, backend=b) for b in ("portable", "reference"))
    assert_same_run(got, want, TOLERANCE[dtype])


@BACKENDS
def test_weights_by_hand(backend: str) -> None:
    """The mean of the magnitudes is 2: what lies at 1 or nearer to 0 becomes 0 (ties to even), the rest +-2."""
    weight = torch.tensor([[1.0, -1.0, 1.01, -1.99], [0.0, 2.0, -3.0, 6.0]])
    want = torch.tensor([[0.0, 0.0, 2.0, -2.0], [0.0, 2.0, -2.0, 2.0]])
    torch.testing.assert_close(ternary_weight(weight, (2,), backend=backend), want, atol=1e-6, rtol=0)
    rows = ternary_weight(weight, None, backend=backend)
    torch.testing.assert_close(rows[1], torch.tensor([0.0, 2.75, -2.75, 2.75]))
    assert torch.equal(rows, ternary_weight(weight, (1, 1), backend=backend))


@BACKENDS
def test_activations_by_hand(backend: str) -> None:
    x = torch.tensor([[127.0, -63.5, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0], [1e-9, 0.0, 0.0, 0.0]])
    want = torch.tensor([[127.0, -64.0, 0.0, 1.0], [0.0] * 4, [0.0] * 4])  # the smallest scale is 1e-8
    torch.testing.assert_close(int8_rows(x, backend=backend), want)


@BACKENDS
def test_gradients_by_hand(backend: str) -> None:
    weight = torch.tensor([[1.0, -2.0, 2.5, -0.5]], requires_grad=True)  # the scale is 1.5
    given = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for ste, want in (("identity", [1.0, 2.0, 3.0, 4.0]), ("clipped", [1.0, 0.0, 0.0, 4.0])):
        (gradient,) = torch.autograd.grad(
            (ternary_weight(weight, (1,), ste=ste, backend=backend) * given).sum(), weight
        )
        torch.testing.assert_close(gradient, torch.tensor([want]))
    x = normal(3, 5).requires_grad_()
    weights = normal(3, 5, seed=1)
    (gradient,) = torch.autograd.grad((int8_rows(x, backend=backend) * weights).sum(), x)
    torch.testing.assert_close(gradient, weights)


@BACKENDS
def test_a_part_of_zeros_stays_zero_and_finite(backend: str) -> None:
    weight = torch.cat([torch.zeros(2, 3), torch.ones(2, 3)]).requires_grad_()
    y = ternary_weight(weight, (2, 2), ste="clipped", backend=backend)
    y.sum().backward()
    assert torch.equal(y, weight) and weight.grad is not None and weight.grad.isfinite().all()


@BACKENDS
def test_low_precision_is_computed_in_float32_whatever_autocast_says(backend: str) -> None:
    weight, x = normal(6, 64, dtype=torch.bfloat16), normal(4, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ternary_weight(weight, (6,), backend=backend), int8_rows(x, backend=backend)
    want = ternary_weight(weight.float(), (6,), backend=backend), int8_rows(x.float(), backend=backend)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())


def test_levels_are_few() -> None:
    assert ternary_weight(normal(30, 20), (10, 20)).unique().numel() == 5  # zero, and two magnitudes
    assert int8_rows(normal(1, 10_000)).unique().numel() <= 255


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def both(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return int8_rows(x) @ ternary_weight(weight, **options).T

    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for rows in (3, 4, 5, 6):
        tensors = {"x": normal(rows, 8, dtype=torch.float32), "weight": normal(6, 8, dtype=torch.float32)}
        options = {"parts": (2, 4), "ste": "clipped"}
        assert_same_run(run(compiled, tensors, **options), run(both, tensors, **options), 1e-6)
    assert counter.frame_count <= 2


def test_errors() -> None:
    weight = torch.zeros(4, 3)
    for parts in ((4, 1), (3,), (4, 0), (5, -1)):
        with pytest.raises(ValueError, match="positive numbers of rows that sum to 4"):
            ternary_weight(weight, parts)
    with pytest.raises(ValueError, match="expected 'identity' or 'clipped'"):
        ternary_weight(weight, ste="none")  # type: ignore[arg-type]
    for shape in ((4,), (4, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="weight has shape"):
            ternary_weight(torch.zeros(shape))
    with pytest.raises(ValueError, match="x has shape"):
        int8_rows(torch.zeros(3, 0))
    with pytest.raises(PlaitError, match="backend"):
        int8_rows(weight, backend="nonsense")
