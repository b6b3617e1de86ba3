"""What the tests of GPU kernels in Triton's interpreter share: float32 on the CPU, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.triton_support import INTERPRET
from tests.ops.helpers import Run, assert_same_run, run, to_double

Tensors = dict[str, Tensor | None]

needs_interpreter = pytest.mark.skipif(
    not INTERPRET.value, reason="not on this platform: with a GPU the same kernels run in tests/gpu"
)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))


def without(tensors: Tensors, *names: str) -> Tensors:
    return {k: None if k in names else t for k, t in tensors.items()}


def time_order(t: Tensor) -> Tensor:
    """The same numbers (S, T, C) with tokens side by side in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def against_reference(
    fn: Callable[..., Any], tensors: Tensors, tolerance: float = 1e-6, **options: Any
) -> Run:
    """Outputs and all gradients of fn's kernels; tenfold stricter than an op in float32 has to be."""
    got = run(fn, tensors, backend="gpu", **options)
    assert_same_run(got, run(fn, to_double(tensors), backend="reference", **options), tolerance)
    return got
