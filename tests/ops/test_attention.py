"""Attention: every form against the query-by-query reference."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from plait.ops.attention import attention, cached_attention

CASES = [(True, None), (True, 3), (False, None), (False, 4)]


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    # a gradient may be exactly zero, hence the floor
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-3))


def qkv(*shape: int, heads: int = 4, kv: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(*shape, h, 8, dtype=dtype, requires_grad=True) for h in (heads, kv, kv)]


def compare(arguments: list[torch.Tensor], tolerance: float = 1e-12, **options: object) -> None:
    """The portable form equals the reference in output and every gradient."""
    results = []
    for backend in ("portable", "reference"):
        y = attention(*arguments, backend=backend, **options)  # type: ignore[arg-type]
        torch.manual_seed(1)
        results.append([y, *torch.autograd.grad(y, arguments, torch.randn_like(y))])
    for ours, true in zip(*results, strict=True):
        assert rms(ours, true) < tolerance


@pytest.mark.parametrize(("causal", "window"), CASES)
@pytest.mark.parametrize("length", [1, 7, 300])
def test_dense(causal: bool, window: int | None, length: int) -> None:
    compare(qkv(2, length), causal=causal, window=window)


@pytest.mark.parametrize(("causal", "window"), CASES)
def test_packed(causal: bool, window: int | None) -> None:
    bounds = torch.tensor([0, 0, 5, 6, 6, 40, 41], dtype=torch.int32)
    compare(qkv(1, 41), causal=causal, window=window, cu_seqlens=bounds, max_len=34)


@pytest.mark.parametrize("window", [None, 70])
def test_packed_in_bfloat16_equals_separate_documents(window: int | None) -> None:
    lengths = [1, 0, 63, 64, 65, 130]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    arguments = [t.detach().bfloat16().requires_grad_() for t in qkv(1, sum(lengths))]
    wide = [t.detach().double().requires_grad_() for t in arguments]
    results = []
    for tensors in (arguments, wide):
        y = attention(*tensors, window=window, cu_seqlens=bounds, max_len=130)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, tensors, weight)])
    for ours, true in zip(*results, strict=True):
        assert rms(ours, true) < 1e-2


def test_window_crosses_query_blocks() -> None:
    compare(qkv(1, 700, heads=1, kv=1), causal=True, window=300)
    compare(qkv(1, 700, heads=1, kv=1), causal=False, window=300)


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("new", [1, 4])
def test_cached(window: int | None, new: int) -> None:
    size = 12 if window is None else window - 1 + new
    total = torch.tensor([4, 11, 7])
    q, k, v = (t.detach() for t in qkv(3, 1))
    q = torch.randn(3, new, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, size, 2, 8, dtype=torch.float64).unbind(0)
    positions = (total - new)[:, None] + torch.arange(new)
    true = cached_attention(q, k, v, positions, total, window=window, backend="reference")
    for bound in (11, 16, None):
        ours = cached_attention(q, k, v, positions, total, window=window, max_keys=bound, backend="portable")
        assert rms(ours, true) < 1e-12


@pytest.mark.parametrize(("causal", "window"), CASES)
def test_traced_packed_form_equals_eager_and_is_not_traced_again(causal: bool, window: int | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(attention, backend=counter, fullgraph=True)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        cuts = torch.randint(0, 64, (7,), generator=generator).sort().values
        bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([64])]).int()
        arguments = qkv(1, 64)
        results = []
        for run in (traced, attention):
            y = run(*arguments, causal=causal, window=window, cu_seqlens=bounds, max_len=64)
            results.append([y, *torch.autograd.grad(y.square().sum(), arguments)])
        for ours, true in zip(*results, strict=True):
            assert rms(ours, true) < 1e-12
    assert counter.frame_count <= 2


def test_wrong_shapes_are_named() -> None:
    q, k, v = qkv(1, 4, heads=3, kv=2)
    with pytest.raises(ValueError, match="H a multiple of Hk"):
        attention(q, k, v)
