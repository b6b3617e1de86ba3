"""On a GPU: the selective scan's kernels at real sizes, in three precisions, against float64.

Run with ``pytest -m gpu tests/gpu``; results of such runs are kept in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.selective_scan import selective_scan
from tests.ops.helpers import assert_close, cumulative, random_lengths, to_double

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding the results to the dtype costs 1.7e-3 in bfloat16, 2.1e-4 in float16; gradients meet rounded ones on the way.
OUTPUT = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
WIDTH, WIDE = 768, 4096
"""Of most tests, because every width compiles the kernels anew."""
TOKENS = ("x", "dt", "z", "B", "C")

Tensors = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel does not write is seen."""
    new_empty, empty = Tensor.new_empty, torch.empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    yield


def draw(
    rows: int, length: int, channels: int, states: int = 16, groups: int | None = None,
    dtype: torch.dtype = torch.float32, n_seq: int | None = None, spread: float = 2.0,
) -> Tensors:  # fmt: skip
    """Steps dt from about 1e-4 to 1, decay rates from 0.1 to 16: memories from one token to thousands."""
    g = torch.Generator("cuda").manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    grouped = (rows, length, states) if groups is None else (rows, length, groups, states)
    tensors = {
        "x": normal(rows, length, channels),
        "dt": normal(rows, length, channels) * spread - 3,
        "A": -0.1 * 160 ** torch.rand(channels, states, generator=g, device="cuda"),
        "B": normal(*grouped),
        "C": normal(*grouped),
        "D": normal(channels),
        "z": normal(rows, length, channels),
        "dt_bias": normal(channels) * 0.5 - 1,
        "initial_state": normal(rows if n_seq is None else n_seq, channels, states),
    }
    return {k: t.to(dtype) if k in TOKENS else t for k, t in tensors.items()}


def everything(tensors: Tensors, **options: Any) -> dict[str, Tensor]:
    """Outputs and all gradients, of one random weighting of the outputs that does not depend on the precision."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    y, final = selective_scan(**leaves, dt_softplus=True, **options)  # type: ignore[arg-type]
    g = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, device="cuda").bfloat16().to(t.dtype) for t in (y, final)]
    given = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad([y, final], list(given.values()), weights)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(given, grads, strict=True))}


def compare(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert_close(got.pop("final"), want["final"], 1e-5, "final")
    assert_close(got.pop("y"), want["y"], OUTPUT[dtype], "y")
    for name, gradient in got.items():
        assert_close(gradient, want[name], GRADIENT[dtype], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length"), [(2, 1027), (1, 65541)])
def test_equals_float64(rows: int, length: int, dtype: torch.dtype) -> None:
    """Sequences in segments; the long one against chunked torch in float64, equal to the recurrence to 1e-12."""
    tensors = draw(rows, length, WIDTH, dtype=dtype, spread=2.0 if length < 2000 else 1.0)
    want = everything(to_double(tensors), backend="reference" if length < 2000 else "portable")
    compare(everything(tensors, backend="gpu"), want, dtype)


def test_odd_sizes_and_steps_of_any_size() -> None:
    """Channels, states and lengths that nothing divides, groups, softplus from e^-20 to 20; float16."""
    tensors = draw(2, 203, 70, 13, 2, torch.float16, spread=8.0)
    want = everything(to_double(tensors), backend="reference")
    compare(everything(tensors, backend="gpu"), want, torch.float16)


@pytest.mark.parametrize("documents", [5, 400])
def test_packed(documents: int) -> None:
    """Documents of length 0 and 1 among them; few long ones in segments, and many short ones."""
    lengths = random_lengths(1500, documents, 3)
    bounds = cumulative(lengths).cuda()
    tensors = draw(1, 1500, WIDTH, dtype=torch.bfloat16, n_seq=documents)
    want = everything(to_double(tensors), cu_seqlens=bounds, backend="reference")
    got = everything(tensors, cu_seqlens=bounds, max_len=max(lengths), backend="gpu")
    compare(got, want, torch.bfloat16)


@pytest.mark.parametrize(("rows", "length"), [(16, 2048), (1, 16384)])
def test_two_runs_are_equal(rows: int, length: int) -> None:
    """At full width, whole sequences and segments; whole ones are also right."""
    tensors = draw(rows, length, WIDE, dtype=torch.bfloat16)
    first, second = (everything(tensors, backend="gpu") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    if rows > 1:
        part = {
            k: t[:1] if k in (*TOKENS, "initial_state") else t for k, t in tensors.items() if t is not None
        }
        y, final = selective_scan(**to_double(part), dt_softplus=True, backend="reference")  # type: ignore[arg-type]
        assert_close(first["y"][:1], y, OUTPUT[torch.bfloat16])
        assert_close(first["final"][:1], final, 1e-5)


def test_more_elements_than_32_bits_count() -> None:
    """Tokens whose state soon forgets: the last ones are computed as if they were alone."""
    length, tail = (1 << 19) + 4096, 1024
    g = torch.Generator("cuda").manual_seed(0)

    def tokens(width: int) -> Tensor:
        return torch.randn(1, length, width, generator=g, device="cuda", dtype=torch.bfloat16)

    weights = {
        "A": -1 - torch.arange(16.0, device="cuda").expand(WIDE, 16),
        "D": torch.ones(WIDE, device="cuda"),
        "dt_bias": torch.zeros(WIDE, device="cuda"),
        "initial_state": torch.ones(1, WIDE, 16, device="cuda"),
    }

    def run(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = {k: t.requires_grad_() for k, t in tensors.items()}
        y, final = selective_scan(**weights, **leaves, dt_softplus=True, backend="gpu")
        weight = torch.zeros_like(y)
        weight[:, -1] = 1
        grads = torch.autograd.grad([y, final], list(leaves.values()), [weight, torch.ones_like(final)])
        return [y[:, -64:].detach().clone(), final.detach(), *(t[:, -64:].clone() for t in grads)]

    tensors = {"x": tokens(WIDE), "z": tokens(WIDE), "B": tokens(16), "C": tokens(16)}
    tensors["dt"] = torch.zeros_like(tensors["x"])
    assert tensors["x"].numel() > 1 << 31
    want = run({k: t[:, -tail:].clone() for k, t in tensors.items()})
    for a, b in zip(run(tensors), want, strict=True):
        assert_close(a, b, 1e-3)


def test_memory_order_does_not_matter() -> None:
    tensors = draw(2, 1027, WIDTH, dtype=torch.bfloat16)
    want = everything(tensors, backend="gpu")
    turned = dict(tensors)
    for name in ("x", "dt", "z", "B", "C"):
        turned[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)  # type: ignore[union-attr]
    got = everything(turned, backend="gpu")
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_never_synchronises() -> None:
    dense = draw(2, 1027, WIDTH, dtype=torch.bfloat16)
    packed = draw(1, 1500, WIDTH, dtype=torch.bfloat16, n_seq=4)
    bounds = cumulative([700, 0, 799, 1]).cuda()
    options: dict[str, Any] = {"cu_seqlens": bounds, "max_len": 800, "backend": "gpu"}
    everything(dense, backend="gpu"), everything(packed, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(dense, backend="gpu"), everything(packed, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_in_a_graph(dtype: torch.dtype) -> None:
    """A captured step, replayed token by token, equals the recurrence."""
    tensors = draw(3, 20, WIDTH, dtype=dtype)
    double = to_double(tensors)
    y, final = selective_scan(**double, dt_softplus=True, backend="reference")  # type: ignore[arg-type]
    state = tensors.pop("initial_state").clone()  # type: ignore[union-attr]
    inputs = {k: t[:, :1].clone() if t.dim() == 3 else t for k, t in tensors.items()}  # type: ignore[union-attr]

    def step() -> Tensor:
        out, new = selective_scan(**inputs, initial_state=state, dt_softplus=True, backend="gpu")
        state.copy_(new)
        return out

    backup = state.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    state.copy_(backup)
    for t in range(20):
        for name in TOKENS:
            inputs[name].copy_(tensors[name][:, t : t + 1])  # type: ignore[index]
        graph.replay()
        assert_close(out[:, 0], y[:, t], OUTPUT[dtype])
    assert_close(state, final, 1e-5)
