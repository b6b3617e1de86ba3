"""Mamba-2's and Mamba-3's Triton kernels on a GPU: every dtype against float64, and mamba_ssm's errors as the measure.

Every variant of a kernel is compiled once (about two seconds), so the cases are few and share shapes where they can.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.ssd import ssd, trapezoidal_ssd
from tests.ops.helpers import cumulative, rms_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

Tensors = dict[str, Tensor]
LENGTHS = (5, 0, 1, 130, 64, 300, 0, 65)
# Relative errors of mamba_ssm 2.3.2 in bfloat16 on such inputs (H200). Ours may be 1.1 times those. The case of the
# gradients is 512 tokens of very slow decays: two chunks there, with one state of 16 bits between; eight here.
Y = {"ordinary": 1.863e-3, "two groups": 1.894e-3, "slow": 2.638e-3}
GRADIENTS = {"x": 2.40e-3, "dt": 2.40e-3, "B": 2.43e-3, "C": 2.45e-3, "dt_bias": 1.88e-3}


def inputs(
    rows: int,
    length: int,
    heads: int = 64,
    width: int = 64,
    state: int = 128,
    groups: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    slow: float = 1.0,
) -> Tensors:
    """Operands as Mamba-2 has them at initialisation; x, B and C are slices of one projection."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device="cuda")

    x = normal(rows, length, heads, width)
    B, C = normal(rows, length, groups, state), normal(rows, length, groups, state)
    dt = normal(rows, length, heads) / 2
    step = torch.exp(uniform(heads) * 4.605 - 6.9078)
    wide = torch.cat([t.to(dtype).flatten(2) for t in (x, B, C)], -1)
    x, B, C = wide.split([heads * width, groups * state, groups * state], -1)
    return {
        "x": x.unflatten(-1, (heads, width)),
        "dt": dt.to(dtype),
        "A": -(1 + 15 * uniform(heads)) / slow,
        "B": B.unflatten(-1, (groups, state)),
        "C": C.unflatten(-1, (groups, state)),
        "D": 1 + normal(heads) / 10,
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }


def inputs3(
    rows: int, length: int, heads: int, rank: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    narrow = torch.rand(3, rows, length, heads, generator=g, device="cuda")
    return {
        "v": normal(rows, length, heads, 64).to(dtype),
        "k": normal(rows, length, rank, heads, 128).to(dtype),
        "q": normal(rows, length, rank, heads, 128).to(dtype),
        "log_decay": -narrow[0],
        "dt": narrow[1],
        "lam": narrow[2],
        "D": normal(heads),
    }


def run(tensors: Tensors, backend: str = "gpu", gradients: bool = True, **options: Any) -> Tensors:
    """y, the final state and all gradients; float64 throughout for the reference."""
    exact = backend == "reference"
    leaves = {n: (t.double() if exact else t.detach()).requires_grad_(gradients) for n, t in tensors.items()}
    if "v" in leaves:
        y, (final, *_) = trapezoidal_ssd(**leaves, backend=backend, **options)
    else:
        y, final = ssd(**leaves, dt_softplus=True, backend=backend, **options)
    if not gradients:
        return {"y": y, "final": final}
    g = torch.Generator("cuda").manual_seed(7)
    # of few digits, so that it is the same in every dtype
    of_y = torch.randn(y.shape, generator=g, device="cuda").bfloat16().to(y.dtype)
    of_final = torch.randn(final.shape, generator=g, device="cuda").to(final.dtype) / 10
    grads = torch.autograd.grad([y, final], list(leaves.values()), [of_y, of_final])
    return {"y": y.detach(), "final": final.detach(), **dict(zip(tensors, grads, strict=True))}


def check(tensors: Tensors, tolerance: float, **options: Any) -> None:
    """Against float64, and a second run equal to the first bit for bit."""
    got, again, want = run(tensors, **options), run(tensors, **options), run(tensors, "reference", **options)
    for name in want:
        assert torch.equal(got[name], again[name]), name
        error = rms_error(got[name], want[name])
        assert error <= tolerance, f"{name}: {error:.3g} > {tolerance:g}"


@pytest.mark.parametrize("case", Y)
def test_y_is_as_exact_as_the_peers(case: str) -> None:
    shape: dict[str, Any] = {
        "ordinary": {"length": 2048},
        "two groups": {"length": 1024, "groups": 2},
        "slow": {"length": 4096, "slow": 200.0},
    }[case]
    tensors = inputs(2, heads=8, **shape)
    got = run(tensors, gradients=False)
    want = run(tensors, "reference", gradients=False)
    assert rms_error(got["y"], want["y"]) <= 1.1 * Y[case]
    assert rms_error(got["final"], want["final"]) <= 1.8e-3


def test_gradients_are_as_exact_as_the_peers() -> None:
    tensors = inputs(1, 512, slow=50.0)
    got, want = run(tensors), run(tensors, "reference")
    for name, peer in GRADIENTS.items():
        assert rms_error(got[name], want[name]) <= 1.1 * peer, name
    # A sum over all tokens that nearly cancels: its error differs threefold between draws, ours and the peer's alike.
    assert rms_error(got["A"], want["A"]) <= 2.5e-3
    assert rms_error(got["D"], want["D"]) <= 1e-4


def test_float32_has_full_digits() -> None:
    """Packed documents of any length, P and N of no tile, two groups."""
    tensors = inputs(1, sum(LENGTHS), 8, 48, 24, 2, dtype=torch.float32)
    tensors["initial_state"] = torch.randn(len(LENGTHS), 8, 48, 24, device="cuda")
    check(tensors, 1e-5, cu_seqlens=cumulative(LENGTHS).cuda())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_documents_in_sixteen_bits(dtype: torch.dtype) -> None:
    tensors = inputs(1, sum(LENGTHS), 8, dtype=dtype)
    tensors["initial_state"] = torch.randn(len(LENGTHS), 8, 64, 128, device="cuda")
    tensors["D"] = torch.randn(8, 64, device="cuda")
    check(tensors, 1e-3 if dtype == torch.float16 else 1e-2, cu_seqlens=cumulative(LENGTHS).cuda())


@pytest.mark.parametrize("rank", [1, 4])
def test_mamba3(rank: int) -> None:
    check(inputs3(1, 200, 4, rank), 5e-3)


def test_mamba3_in_float32() -> None:
    check(inputs3(1, sum(LENGTHS), 4, dtype=torch.float32), 1e-5, cu_seqlens=cumulative(LENGTHS).cuda())


@pytest.mark.parametrize("row", [1, 2, 4])
def test_other_configurations(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this GPU takes for none of the shapes above."""
    from plait.ops.ssd import gpu_engine

    size, largest, _, config = gpu_engine.CONFIGS[row]
    monkeypatch.setattr(gpu_engine, "choose_config", lambda *_: config)
    gpu_engine.plans.clear()
    dtype = torch.bfloat16 if size == 2 else torch.float32
    check(inputs(1, 200, 8, state=largest, dtype=dtype), 1e-2 if size == 2 else 1e-5)
    gpu_engine.plans.clear()


@pytest.mark.parametrize("length", [65_536, (1 << 31) // (64 * 64) + 1000])
def test_a_row_so_long_that_it_is_cut_in_pieces(length: int) -> None:
    """The second one has more than 2^31 elements. After 2,000 tokens nothing of the beginning is left."""
    if torch.cuda.get_device_properties(0).total_memory < 100 << 30 and length > 1 << 17:
        pytest.skip("needs a GPU of 100 GB")
    whole = inputs(1, length)
    tail = {n: t[:, -2048:] if t.dim() > 2 else t for n, t in whole.items()}
    got, again = run(whole), run(whole)
    assert all(torch.equal(got[n], again[n]) for n in got)
    want = run(tail, "reference", gradients=False)
    assert rms_error(got["y"][:, -512:], want["y"][:, -512:]) <= 2.2e-3
    assert rms_error(got["final"], want["final"]) <= 1.8e-3
    # the same weights of y on the tail alone
    leaves = {n: t.detach().requires_grad_() for n, t in tail.items()}
    y, final = ssd(**leaves, dt_softplus=True, backend="gpu")  # type: ignore[arg-type]
    g = torch.Generator("cuda").manual_seed(7)
    of_y = torch.randn(got["y"].shape, generator=g, device="cuda").bfloat16()[:, -2048:]
    of_final = torch.randn(final.shape, generator=g, device="cuda") / 10
    grads = dict(
        zip(tail, torch.autograd.grad([y, final], list(leaves.values()), [of_y, of_final]), strict=True)
    )
    for name in ("x", "dt", "B", "C"):
        assert rms_error(got[name][:, -512:], grads[name][:, -512:]) <= 4e-3, name


def test_a_step_of_decoding_in_a_graph() -> None:
    tensors = inputs(3, 1)
    tensors["initial_state"] = torch.randn(3, 64, 64, 128, device="cuda")
    with torch.no_grad():
        eager = run(tensors, gradients=False)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(tensors, gradients=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(tensors, gradients=False)
        graph.replay()
    want = run(tensors, "reference", gradients=False)
    for name in want:
        assert torch.equal(captured[name], eager[name])
        assert rms_error(eager[name], want[name]) <= (2e-3 if name == "y" else 1e-6)
