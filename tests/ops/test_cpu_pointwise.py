"""The CPU kernels of the causal convolution and the gated norm against the float64 references."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops import dispatch
from plait.ops.causal_conv1d import CAUSAL_CONV1D, causal_conv1d
from plait.ops.causal_conv1d import cpu as conv_cpu
from plait.ops.causal_conv1d.cpu_kernels import CHANNELS
from plait.ops.causal_conv1d.cpu_kernels import ROWS as CONV_ROWS
from plait.ops.gated_norm import GATED_NORM, gated_norm
from plait.ops.gated_norm import cpu as norm_cpu
from plait.ops.gated_norm.cpu_kernels import ROWS as NORM_ROWS
from plait.ops.threads import pool as thread_pool
from tests.ops.helpers import (
    Run,
    assert_close,
    assert_same_run,
    cumulative,
    random_lengths,
    rms_error,
    run,
    to_double,
)

LENGTHS = [3, 0, 1, 2, 9, 0, 5, 1, 0]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel does not write is seen."""
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64).to(
        dtype
    )


def convolution(
    rows: int, length: int, channels: int, width: int, n_seq: int, *, seed: int = 0, low: bool = False
) -> dict[str, Tensor | None]:
    """Inputs; with `low` those of autocast: x and the state bfloat16, the parameters float32."""
    kind = torch.bfloat16 if low else torch.float32
    return {
        "x": normal(rows, length, channels, seed=seed, dtype=kind),
        "weight": normal(channels, width, seed=seed + 1),
        "bias": normal(channels, seed=seed + 2),
        "initial_state": normal(n_seq, width - 1, channels, seed=seed + 3, dtype=kind),
    }


def norm(*shape: int, seed: int = 0, low: bool = False) -> dict[str, Tensor | None]:
    kind = torch.bfloat16 if low else torch.float32
    return {
        "x": normal(*shape, seed=seed, dtype=kind),
        "z": normal(*shape, seed=seed + 1, dtype=kind),
        "weight": normal(shape[-1], seed=seed + 2),
    }


def without(tensors: dict[str, Tensor | None], names: set[str]) -> dict[str, Tensor | None]:
    return {k: None if k in names else t for k, t in tensors.items()}


def against_reference(fn: Any, tensors: dict[str, Tensor | None], **options: Any) -> None:
    got = run(fn, tensors, backend="cpu", **options)
    want = run(fn, to_double(tensors), backend="reference", **options)
    assert_same_run(got, want, 1e-5)


def as_good_as_portable(fn: Any, tensors: dict[str, Tensor | None], **options: Any) -> None:
    """bfloat16: dtypes alike, and no further from the reference than portable, give or take a fifth."""
    want = run(fn, to_double(tensors), backend="reference", **options)
    got, other = (run(fn, tensors, backend=backend, **options) for backend in ("cpu", "portable"))
    for ours, theirs, true in zip(flat(got), flat(other), flat(want), strict=True):
        assert ours.dtype == theirs.dtype
        assert rms_error(ours, true) <= 1.2 * rms_error(theirs, true) + 1e-6


def flat(result: Run) -> list[Tensor]:
    return [*result.outputs, *result.grads.values()]


def same_bits(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.usefixtures("poison")
class TestConvolution:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        rows=st.integers(1, 3),
        length=st.integers(0, 20),
        channels=st.sampled_from([1, 3, 16, 33, 100]),
        width=st.integers(1, 5),
        activation=st.sampled_from([None, "silu"]),
        absent=st.sets(st.sampled_from(["bias", "initial_state"])),
        seed=st.integers(0, 9),
    )
    def test_dense(
        self,
        rows: int,
        length: int,
        channels: int,
        width: int,
        activation: str | None,
        absent: set[str],
        seed: int,
    ) -> None:
        tensors = convolution(rows, length, channels, width, rows, seed=seed)
        against_reference(causal_conv1d, without(tensors, absent), activation=activation)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        n=st.integers(1, 40),
        documents=st.integers(1, 7),
        width=st.integers(1, 5),
        activation=st.sampled_from([None, "silu"]),
        absent=st.sets(st.sampled_from(["bias", "initial_state"])),
        seed=st.integers(0, 9),
    )
    def test_packed(
        self, n: int, documents: int, width: int, activation: str | None, absent: set[str], seed: int
    ) -> None:
        lengths = random_lengths(n, documents, seed)
        tensors = without(convolution(1, n, 21, width, documents, seed=seed), absent)
        packing = {"cu_seqlens": cumulative(lengths, torch.int64 if seed % 2 else torch.int32), "max_len": n}
        against_reference(causal_conv1d, tensors, activation=activation, **packing)

    @pytest.mark.parametrize("shift", [-3, -1, 0, 1, 2])
    def test_documents_around_the_edges_of_tasks(self, shift: int) -> None:
        """Boundaries on, before and behind the row where one task ends, more channels than one task takes."""
        lengths = [0, CONV_ROWS + shift, 0, 1, 1, 0, CONV_ROWS - 3, 4, CONV_ROWS, 0]
        n = sum(lengths)
        tensors = convolution(1, n, CHANNELS + 19, 4, len(lengths))
        packing = {"cu_seqlens": cumulative(lengths), "max_len": n}
        against_reference(causal_conv1d, tensors, activation="silu", **packing)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_exactly_whole_tasks(self, rows: int) -> None:
        tensors = convolution(rows, CONV_ROWS, 8, 4, rows)
        against_reference(causal_conv1d, tensors, activation="silu")

    def test_low_precision(self) -> None:
        tensors = convolution(1, 300, 37, 4, len(LENGTHS) + 1, low=True)
        packing = {"cu_seqlens": cumulative([*LENGTHS, 300 - sum(LENGTHS)]), "max_len": 300}
        as_good_as_portable(causal_conv1d, tensors, activation="silu", **packing)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = run(causal_conv1d, tensors, activation="silu", backend="cpu", **packing)
        assert same_bits(again, run(causal_conv1d, tensors, activation="silu", backend="cpu", **packing))

    def test_no_path_over_a_boundary(self) -> None:
        tensors = convolution(1, sum(LENGTHS), 4, 4, len(LENGTHS))
        bad = torch.zeros(1, sum(LENGTHS), dtype=torch.bool)
        bad[:, sum(LENGTHS[:4]) : sum(LENGTHS[:5])] = True
        x = tensors["x"].masked_fill(bad.unsqueeze(2), float("nan")).requires_grad_()
        options = {"cu_seqlens": cumulative(LENGTHS), "max_len": 9, "activation": "silu", "backend": "cpu"}
        y, final = causal_conv1d(**tensors | {"x": x}, **options)
        assert torch.equal(y.isnan().any(2), bad)
        assert final.isnan().flatten(1).any(1).nonzero().tolist() == [[4]]
        y.sum().backward()
        assert not x.grad[~bad].isnan().any()

    @pytest.mark.parametrize("low", [False, True])
    def test_nothing_to_do(self, low: bool) -> None:
        for rows, length, channels in [(2, 0, 3), (0, 5, 3), (0, 0, 3), (2, 3, 0)]:
            tensors = convolution(rows, length, channels, 4, rows, low=low)
            y, final = causal_conv1d(**tensors, backend="cpu")
            assert y.shape == (rows, length, channels) and y.dtype == tensors["x"].dtype
            assert final.shape == tensors["initial_state"].shape
            assert length or torch.equal(final, tensors["initial_state"])
            run(causal_conv1d, tensors, backend="cpu")
        tensors = convolution(1, 0, 3, 4, 2, low=low)
        result = run(causal_conv1d, tensors, cu_seqlens=cumulative([0, 0]), max_len=0, backend="cpu")
        assert torch.equal(result.outputs[1], tensors["initial_state"])
        assert result.grads["initial_state"].abs().min() > 0 and not result.grads["weight"].any()
        x, weight = tensors["x"], tensors["weight"]
        _, final = causal_conv1d(x, weight, cu_seqlens=cumulative([]), max_len=0, backend="cpu")
        assert final.shape == (0, 3, 3)

    def test_strides(self) -> None:
        """A slice of a wide projection is read where it lies; time innermost and odd gradients work too."""
        tensors = convolution(2, 9, 22, 4, 2)
        wide = normal(2, 9, 60, seed=5)
        wide[..., 7:29] = tensors["x"]
        for x in (wide[..., 7:29], tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)):
            weight = tensors["weight"].t().contiguous().t()
            y, final = causal_conv1d(**tensors | {"x": x, "weight": weight}, backend="cpu")
            want, state = causal_conv1d(**tensors, backend="cpu")
            assert torch.equal(y, want) and torch.equal(final, state)
        tensors["x"] = wide[..., 7:29]
        grads = {}
        for backend in ("cpu", "reference"):
            x = (tensors["x"] if backend == "cpu" else tensors["x"].double()).detach().requires_grad_()
            weight = tensors["weight"].to(x.dtype)
            y, _ = causal_conv1d(x, weight, backend=backend)
            # a transposed and a broadcast gradient
            turned = normal(22, 9, 2, seed=6).to(x.dtype).permute(2, 1, 0)
            for i, dy in enumerate((turned, y.new_ones(()).expand_as(y))):
                grads[backend, i] = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
        for i in range(2):
            assert_close(grads["cpu", i], grads["reference", i], 1e-5)

    def test_nothing_but_inputs_is_kept(self) -> None:
        tensors, kept = convolution(1, 256, 16, 4, 1), []
        tensors["x"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            causal_conv1d(**tensors, activation="silu", backend="cpu")
        assert sum(kept) < 1.1 * 256 * 16


@pytest.mark.usefixtures("poison")
class TestNorm:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        shape=st.sampled_from(
            [(5, 7), (2, 3, 24), (1, NORM_ROWS + 1, 33), (1, NORM_ROWS, 48), (6,), (0, 12)]
        ),
        groups=st.integers(1, 3),
        first=st.booleans(),
        absent=st.sets(st.sampled_from(["z", "weight"])),
        eps=st.sampled_from([1e-5, 0.3]),
        seed=st.integers(0, 9),
    )
    def test_any_shape(
        self, shape: tuple[int, ...], groups: int, first: bool, absent: set[str], eps: float, seed: int
    ) -> None:
        size = shape[-1] // groups if shape[-1] % groups == 0 else None
        tensors = without(norm(*shape, seed=seed), absent)
        against_reference(gated_norm, tensors, group_size=size, norm_before_gate=first, eps=eps)

    @pytest.mark.parametrize("first", [False, True])
    def test_large_and_small_numbers(self, first: bool) -> None:
        tensors = norm(9, 40)
        tensors["z"] = tensors["z"] * torch.logspace(-3, 2, 9).unsqueeze(1)
        against_reference(gated_norm, tensors, norm_before_gate=first)

    @pytest.mark.parametrize("first", [False, True])
    def test_low_precision(self, first: bool) -> None:
        tensors = norm(3, 50, 72, low=True)
        as_good_as_portable(gated_norm, tensors, group_size=24, norm_before_gate=first)
        as_good_as_portable(gated_norm, tensors | {"x": tensors["x"].float()}, norm_before_gate=first)
        as_good_as_portable(gated_norm, tensors | {"z": tensors["z"].double()}, norm_before_gate=first)

    def test_strides(self) -> None:
        tensors = norm(2, 9, 22)
        want = run(gated_norm, tensors, backend="cpu")
        wide = normal(2, 9, 60, seed=5)
        wide[..., 7:29], wide[..., 30:52] = tensors["x"], tensors["z"]
        apart = tensors["z"].transpose(1, 2).contiguous().transpose(1, 2)
        for z in (wide[..., 30:52], apart):
            y = gated_norm(wide[..., 7:29], z, tensors["weight"], backend="cpu")
            assert torch.equal(y, want.outputs[0])

    def test_what_is_kept(self) -> None:
        tensors, kept = norm(256, 16), []
        tensors["x"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            gated_norm(**tensors, backend="cpu")
        assert sum(kept) <= 2 * 256 * 16 + 256 + 16


CASES = [
    (causal_conv1d, convolution(1, 700, 150, 4, 3), {
        "activation": "silu", "cu_seqlens": cumulative([300, 0, 400]), "max_len": 400,
    }),
    (gated_norm, norm(700, 150), {"group_size": 50}),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "tensors", "options"), CASES, ids=["conv", "norm"])
def test_same_bits_between_runs_and_thread_counts(
    fn: Any, tensors: dict[str, Tensor | None], options: dict[str, Any]
) -> None:
    seen: set[str] = set()
    once = run(fn, tensors, backend="cpu", **options)
    assert same_bits(once, run(fn, tensors, backend="cpu", **options))
    pool = thread_pool()
    submit = pool.submit
    pool.submit = lambda work: seen.add(threading.current_thread().name) or submit(work)  # type: ignore[method-assign]
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert same_bits(once, run(fn, tensors, backend="cpu", **options))
    finally:
        torch.set_num_threads(1)
        del pool.submit
    assert seen, "no kernel ran on two threads"


@pytest.mark.parametrize("low", [False, True])
def test_opcheck(low: bool) -> None:
    tensors = convolution(1, 20, 5, 3, 2, low=low)
    x, weight, bias, tail = (t.requires_grad_() for t in tensors.values())
    bounds = torch.tensor([0, 13, 20])
    torch.library.opcheck(conv_cpu._forward, (x[0], weight, bias, tail, bounds, True))
    torch.library.opcheck(conv_cpu._forward, (x[0], weight, None, None, bounds, False))
    y, final = conv_cpu._forward(x[0], weight, bias, tail, bounds, True)
    plain = [t.detach() for t in (y, final, x[0], weight, bias, tail)]
    torch.library.opcheck(conv_cpu._backward, (*plain, bounds, True))
    torch.library.opcheck(conv_cpu._backward, (plain[0], None, *plain[2:4], None, None, bounds, True))
    x, z, weight = (t.requires_grad_() for t in norm(9, 12, low=low).values())
    torch.library.opcheck(norm_cpu._forward, (x, z, weight, 1e-5, 4, True, torch.float32))
    torch.library.opcheck(norm_cpu._forward, (x, None, None, 1e-5, 12, False, torch.bfloat16))
    y, scales = (t.detach() for t in norm_cpu._forward(x, z, weight, 1e-5, 4, True, torch.float32))
    torch.library.opcheck(norm_cpu._backward, (y, x.detach(), z.detach(), weight.detach(), scales, 4, True))
    torch.library.opcheck(norm_cpu._backward, (y, x.detach(), None, None, scales, 4, True))


@pytest.mark.parametrize(("fn", "tensors", "options"), CASES, ids=["conv", "norm"])
def test_one_graph(fn: Any, tensors: dict[str, Tensor | None], options: dict[str, Any]) -> None:
    """Compiled without breaks, and by the automatic choice."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert same_bits(run(compiled, tensors, **options), run(fn, tensors, backend="cpu", **options))


@pytest.mark.parametrize(("fn", "tensors", "options"), CASES, ids=["conv", "norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_portable(
    fn: Any, tensors: dict[str, Tensor | None], options: dict[str, Any], dtype: torch.dtype
) -> None:
    tensors = tensors | {"x": tensors["x"].to(dtype)}
    with pytest.raises(BackendError, match=rf"takes torch.float32, torch.bfloat16, given {dtype}"):
        fn(**tensors, backend="cpu", **options)
    want = run(fn, tensors, backend="portable", **options)
    assert same_bits(run(fn, tensors, **options), want)


def test_automatic_takes_the_kernels() -> None:
    for op in (CAUSAL_CONV1D, GATED_NORM):
        assert dispatch.choose_name(op, "auto", "cpu", torch.bfloat16) == "cpu"
        assert dispatch.choose_name(op, "auto", "cpu", torch.float64) == "portable"


def test_sigmoid_everywhere() -> None:
    """silu to a few units in the last place, infinities and NaN as in torch."""
    x = torch.cat(
        [torch.linspace(-90, 90, 4001), torch.tensor([-1e38, -200.0, 1e38, float("inf"), float("nan")])]
    )
    x = x.view(1, -1, 1)
    y, _ = causal_conv1d(x, torch.ones(1, 1), activation="silu", backend="cpu")
    want = torch.nn.functional.silu(x.double())
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=1e-36, equal_nan=True)
    near = x.abs() < 10
    torch.testing.assert_close(y[near].double(), want[near], rtol=1e-6, atol=0)
