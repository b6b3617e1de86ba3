"""On a GPU: the diagonal model's kernels at real sizes, real and complex, packed, against float64.

Run with ``pytest -m gpu tests/gpu``; results of such runs are kept in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import Run, assert_close, cumulative, random_lengths
from tests.ops.test_diagonal_ssm import call, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

Tensors = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel does not write is seen."""
    new_empty, empty = Tensor.new_empty, torch.empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    yield


def everything(tensors: Tensors, **options: Any) -> Run:
    """Outputs and all gradients, of one weighting of the outputs that is the same in every precision."""
    leaves = {k: None if t is None else t.detach().cuda().requires_grad_() for k, t in tensors.items()}
    outputs = call(**leaves, **options)
    g = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(t.shape, generator=g, device="cuda").bfloat16().to(t.dtype) for t in outputs]
    given = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(outputs, list(given.values()), weights)
    return Run([t.detach() for t in outputs], dict(zip(given, grads, strict=True)))


def check(tensors: Tensors, tolerance: float, **options: Any) -> None:
    """Against float64; a second run is equal to the first bit for bit."""
    first, second = (everything(tensors, backend="gpu", **options) for _ in range(2))
    exact = {k: None if t is None else t.double() for k, t in tensors.items()}
    want = everything(exact, backend="portable", **options)
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert torch.equal(a, b)
    for i, (a, b) in enumerate(zip(first.outputs, want.outputs, strict=True)):
        assert_close(a, b, tolerance if i == 0 else 1e-5, f"output {i}")
    for name, gradient in first.grads.items():
        assert torch.equal(gradient, second.grads[name]), name
        assert_close(gradient, want.grads[name], tolerance, name)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length", "channels"), [(2, 3000, 70), (1, 20001, 512)])
def test_equals_float64(rows: int, length: int, channels: int, dtype: torch.dtype, complex: bool) -> None:
    tensors = make(rows, length, complex=complex, channels=channels, states=16, dtype=torch.float32)
    tensors["x"] = tensors["x"].to(dtype)  # type: ignore[union-attr]
    check(tensors, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("documents", [5, 300])
def test_packed(documents: int) -> None:
    """Documents of length 0 and 1 among them."""
    lengths = random_lengths(5000, documents, 3)
    tensors = make(1, 5000, complex=True, channels=70, states=8, dtype=torch.float32, n_seq=documents)
    check(tensors, 1e-5, cu_seqlens=cumulative(lengths).cuda(), max_len=max(lengths))


def test_never_synchronises() -> None:
    tensors = {
        k: t.cuda() for k, t in make(1, 3000, complex=True, dtype=torch.float32).items() if t is not None
    }
    everything(tensors, backend="gpu")  # type: ignore[arg-type]
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(tensors, backend="gpu")  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
