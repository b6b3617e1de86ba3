"""The selective scan: the original's numbers, portable against the recurrence, packed, split, compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from plait.config.errors import PlaitError
from plait.ops.selective_scan import selective_scan
from plait.ops.selective_scan.portable import CHUNK, LONG, LONG_CHUNK
from tests.ops.helpers import (
    assert_close,
    assert_same_run,
    cumulative,
    padded_cumulative,
    random_lengths,
    run,
    separate_documents,
    to_double,
)

FIXTURES = Path(__file__).parent.parent / "fixtures" / "mamba_selective_scan"
CASES = json.loads((FIXTURES / "meta.json").read_text())["cases"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = [torch.float64, torch.float32]
BACKENDS = ["portable", "reference"]
LENGTHS = [CHUNK + 1, 0, 1, 2 * CHUNK, 5, 0, CHUNK - 1, 1, 0]
OPTIONAL = ["D", "z", "dt_bias", "initial_state"]


def make(
    rows: int,
    length: int,
    channels: int = 4,
    states: int = 3,
    groups: int | None = None,
    dtype: torch.dtype = torch.float64,
    n_seq: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Inputs with dt from 1e-6 to 20 and decay rates from 0.01 to 16; dt_bias is kept positive for that."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    def spread(low: float, high: float, *shape: int) -> Tensor:
        part = torch.rand(*shape, generator=draw, dtype=torch.float64)
        return (low * (high / low) ** part).to(dtype)

    grouped = (rows, length, states) if groups is None else (rows, length, groups, states)
    return {
        "x": normal(rows, length, channels),
        "dt": spread(1e-6, 20, rows, length, channels),
        "A": -spread(0.01, 16, channels, states),
        "B": normal(*grouped),
        "C": normal(*grouped),
        "D": normal(channels),
        "z": normal(rows, length, channels),
        "dt_bias": spread(1e-6, 1e-2, channels),
        "initial_state": normal(rows if n_seq is None else n_seq, channels, states),
    }


def leave_out(tensors: dict[str, Tensor | None], names: set[str]) -> dict[str, Tensor | None]:
    return {k: None if k in names else t for k, t in tensors.items()}


def against_reference(tensors: dict[str, Tensor | None], **options: Any) -> None:
    x = tensors["x"]
    assert x is not None
    got = run(selective_scan, tensors, backend="portable", **options)
    want = run(selective_scan, to_double(tensors), backend="reference", **options)
    assert_same_run(got, want, TOLERANCE[x.dtype])
    assert [t.dtype for t in got.outputs] == [x.dtype, x.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_oracle(case: str, backend: str, dtype: torch.dtype) -> None:
    """Outputs, last state and both sets of gradients of state-spaces/mamba, to the tolerances of its README."""
    stored = load_file(FIXTURES / f"{case}.safetensors")
    names = [n for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if n in stored]
    leaves = {n: stored[n].to(dtype).requires_grad_() for n in names}
    rows, _, length = stored["u"].shape

    def time_second(name: str) -> Tensor | None:
        t = leaves.get(name)
        if t is None:
            return None
        if name in "BC" and t.dim() == 2:  # constant: a group a channel
            return t.view(1, 1, *t.shape).expand(rows, length, *t.shape)
        return t.movedim(-1, 1)

    y, final = selective_scan(
        time_second("u"),
        time_second("delta"),
        leaves["A"],
        time_second("B"),
        time_second("C"),
        leaves.get("D"),
        z=time_second("z"),
        dt_bias=leaves.get("delta_bias"),
        dt_softplus=CASES[case]["delta_softplus"],
        backend=backend,
    )

    def check(got: Tensor, want: Tensor, tolerance: float) -> None:
        if dtype == torch.float64:
            assert (got - want).abs().max() <= 2e-6 * want.abs().max()
        else:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    check(y.transpose(1, 2), stored["out"], 1e-5)
    check(final, stored["last_state"], 1e-5)
    loss = (y.transpose(1, 2) * stored["w_out"]).sum()
    for prefix, value in (("grad_out", loss), ("grad_out_state", loss + (final * stored["w_state"]).sum())):
        grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        for name, grad in zip(names, grads, strict=True):
            check(grad, stored[f"{prefix}.{name}"], 1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3),
    length=st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 4 * CHUNK + 3]),
    shape=st.sampled_from([(4, 3, None), (6, 2, 3), (5, 1, 5), (1, 8, 1), (33, 4, None)]),
    softplus=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    without=st.sets(st.sampled_from(OPTIONAL)),
    seed=st.integers(0, 9),
)
def test_dense(
    rows: int,
    length: int,
    shape: tuple[int, int, int | None],
    softplus: bool,
    dtype: torch.dtype,
    without: set[str],
    seed: int,
) -> None:
    tensors = make(rows, length, *shape, dtype=dtype, seed=seed)
    against_reference(leave_out(tensors, without), dt_softplus=softplus)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 90),
    documents=st.integers(1, 7),
    groups=st.sampled_from([None, 1, 2]),
    softplus=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    without=st.sets(st.sampled_from(OPTIONAL)),
    seed=st.integers(0, 9),
)
def test_packed(
    n: int,
    documents: int,
    groups: int | None,
    softplus: bool,
    dtype: torch.dtype,
    without: set[str],
    seed: int,
) -> None:
    lengths = random_lengths(n, documents, seed)
    tensors = make(1, n, groups=groups, dtype=dtype, n_seq=documents, seed=seed)
    cu_seqlens = cumulative(lengths, torch.int64 if seed % 2 else torch.int32)
    bound = max(lengths) + seed % 5 if seed else None
    against_reference(leave_out(tensors, without), dt_softplus=softplus, cu_seqlens=cu_seqlens, max_len=bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_longer_chunks(dtype: torch.dtype) -> None:
    length = LONG + 3 * LONG_CHUNK + 1
    against_reference(make(1, length, 2, 2, dtype=dtype), dt_softplus=True)


def test_blocks_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one shorter, give the same as one."""
    monkeypatch.setattr("plait.ops.selective_scan.portable.BLOCK_ELEMENTS", {"cpu": 60})
    against_reference(make(1, 13 * CHUNK + 2), dt_softplus=True)
    against_reference(make(1, sum(LENGTHS), n_seq=len(LENGTHS)), cu_seqlens=cumulative(LENGTHS), max_len=64)
    against_reference(make(7, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_separate_documents(backend: str) -> None:
    tensors = make(1, sum(LENGTHS), n_seq=len(LENGTHS))
    options = {"dt_softplus": True, "backend": backend}

    def separate(
        x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, initial_state: Tensor, **rest: Tensor
    ) -> Any:
        return separate_documents(
            lambda **t: selective_scan(**t, **rest, **options),
            {"x": x, "dt": dt, "B": B, "C": C, "z": z},
            {"initial_state": initial_state},
            LENGTHS,
        )

    packed = run(selective_scan, tensors, cu_seqlens=cumulative(LENGTHS), max_len=2 * CHUNK, **options)
    assert_same_run(packed, run(separate, tensors), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_path_over_a_boundary(backend: str) -> None:
    """NaN in one document stays there, in outputs, states and the input's gradient."""
    tensors = make(1, sum(LENGTHS), dtype=torch.float32, n_seq=len(LENGTHS))
    bad = torch.zeros(1, sum(LENGTHS), dtype=torch.bool)
    bad[:, sum(LENGTHS[:3]) : sum(LENGTHS[:4])] = True
    x = tensors["x"].masked_fill(bad.unsqueeze(2), float("nan")).requires_grad_()
    tensors["x"] = x
    y, final = selective_scan(**tensors, cu_seqlens=cumulative(LENGTHS), max_len=64, backend=backend)
    assert torch.equal(y.isnan().any(2), bad)
    assert final.isnan().flatten(1).any(1).nonzero().view(-1).tolist() == [3]
    (y.sum() + final.sum()).backward()
    assert not x.grad[~bad].isnan().any()


@pytest.mark.parametrize("cut", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_any_split_is_the_whole(cut: int) -> None:
    tensors = make(2, 2 * CHUNK + 5)
    options = {"dt_softplus": True, "backend": "portable"}

    def halves(initial_state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        state, ys = initial_state, []
        for part in (slice(None, cut), slice(cut, None)):
            split = {k: t[:, part] if t.dim() == 3 else t for k, t in inputs.items()}
            y, state = selective_scan(**split, initial_state=state, **options)
            ys.append(y)
        return torch.cat(ys, 1), state

    assert_same_run(run(halves, tensors), run(selective_scan, tensors, **options), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_by_step(backend: str) -> None:
    tensors = make(2, 6)
    y, final = selective_scan(**tensors, backend=backend)
    state = tensors.pop("initial_state")
    for t in range(6):
        step = {k: v[:, t : t + 1] if v.dim() == 3 else v for k, v in tensors.items()}
        y_t, state = selective_scan(**step, initial_state=state, backend=backend)
        assert_close(y_t, y[:, t : t + 1], 1e-12)
    assert_close(state, final, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_keeps_the_state(backend: str) -> None:
    tensors = make(1, sum(LENGTHS), dtype=torch.float32, n_seq=len(LENGTHS))
    tensors["initial_state"][LENGTHS.index(0), 0, 0] = -0.0
    _, final = selective_scan(**tensors, cu_seqlens=cumulative(LENGTHS), max_len=32, backend=backend)
    empty = [i for i, length in enumerate(LENGTHS) if length == 0]
    same = final[empty].view(torch.int32) == tensors["initial_state"][empty].view(torch.int32)
    assert same.all()
    for rows, length in [(2, 0), (0, 5), (0, 0)]:
        tensors = make(rows, length, dtype=torch.bfloat16)
        y, final = selective_scan(**tensors, backend=backend)
        assert y.shape == (rows, length, 4) and y.dtype == torch.bfloat16
        assert torch.equal(final, tensors["initial_state"].float()) and final.dtype == torch.float32
    tensors = make(1, 0, n_seq=2)
    for lengths in ([0, 0], []):
        tensors["initial_state"] = tensors["initial_state"][: len(lengths)]
        _, final = selective_scan(**tensors, cu_seqlens=cumulative(lengths), max_len=0, backend=backend)
        assert torch.equal(final, tensors["initial_state"])


def test_causal_bit_for_bit() -> None:
    tensors = make(1, 3 * CHUNK, dtype=torch.float32)
    y, _ = selective_scan(**tensors, backend="portable")
    for name in ("x", "dt", "B", "C", "z"):
        changed = {k: t.clone() for k, t in tensors.items()}
        changed[name][:, CHUNK + 4] += 1
        z, _ = selective_scan(**changed, backend="portable")
        assert torch.equal(y[:, : CHUNK + 4], z[:, : CHUNK + 4])
        assert not torch.equal(y[:, CHUNK + 4], z[:, CHUNK + 4])


@pytest.mark.parametrize(("lengths", "groups"), [(None, 2), ([3, 0, 1], None)])
def test_gradcheck(lengths: list[int] | None, groups: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.ops.selective_scan.portable.CHUNK", 2)
    tensors = make(1, 4, 2, 2, groups, n_seq=1 if lengths is None else 3)
    tensors["dt"] = tensors["dt"].log()  # a plain number, for softplus
    options = {} if lengths is None else {"cu_seqlens": cumulative(lengths), "max_len": 3}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: selective_scan(
            **dict(zip(names, leaves, strict=True)), dt_softplus=True, backend="portable", **options
        ),
        [t.requires_grad_() for t in tensors.values()],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend: str) -> None:
    """bfloat16 in: y bfloat16, the state float32, computed in float32, whatever autocast says."""
    tensors = make(2, 40, dtype=torch.bfloat16)
    want, state = selective_scan(**to_double(tensors), dt_softplus=True, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = selective_scan(**tensors, dt_softplus=True, backend=backend)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert_close(y, want, 3e-3)
    assert_close(final, state, 1e-5)
    tensors = make(2, 40, dtype=torch.float32)
    expected = run(selective_scan, to_double(tensors), dt_softplus=True, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(selective_scan, tensors, dt_softplus=True, backend=backend)
    assert_same_run(got, expected, 1e-5)


def test_any_strides() -> None:
    """Slices of one wide projection, and time innermost."""
    tensors = make(2, 2 * CHUNK + 1)
    want = run(selective_scan, tensors, backend="portable")
    wide = torch.cat([t for t in tensors.values() if t.dim() == 3 and t.shape[:2] == (2, 2 * CHUNK + 1)], 2)

    def sliced(wide: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, B, C, z = wide.split([4, 4, 3, 3, 4], 2)
        return selective_scan(x, dt, B=B, C=C, z=z, **rest, backend="portable")

    rest = {k: tensors[k] for k in ("A", "D", "dt_bias", "initial_state")}
    for memory in (wide, wide.transpose(1, 2).contiguous().transpose(1, 2)):
        leaf = memory.requires_grad_()
        y, final = sliced(leaf, **rest)
        assert_close(y, want.outputs[0], 1e-14)
        assert_close(final, want.outputs[1], 1e-14)
    got = run(sliced, {"wide": wide.detach(), **rest})
    joined = torch.cat([want.grads[k] for k in ("x", "dt", "B", "C", "z")], 2)
    assert_close(got.grads["wide"], joined, 1e-13)


class _Count(TorchDispatchMode):
    """Counts operations and remembers the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_memory_and_number_of_operations() -> None:
    """Linear in T / chunk, and nothing of size T * E * N, neither kept nor on the way."""
    channels, states, counts = 16, 64, []
    for length in (512, 1024):
        tensors = make(1, length, channels, states, dtype=torch.float32)
        kept: list[int] = []

        def pack(t: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(t.numel())
            return t

        with _Count() as count, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(selective_scan, tensors, dt_softplus=True, backend="portable")
        counts.append(count.operations)
        assert sum(kept) < 16 * length * (channels + 2 * states) + length // CHUNK * channels * states
        assert count.largest < length * channels * states // 4
    assert counts[1] < 2.1 * counts[0] < 2.1 * (40 * CHUNK * 16 + 10 * 512 // CHUNK)


@pytest.fixture
def small_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.ops.selective_scan.portable.CHUNK", 4)
    torch._dynamo.reset()


@pytest.mark.usefixtures("small_graph")
def test_packings_share_a_graph() -> None:
    """Twenty packings: one graph, without breaks, and another one when max_len first changes."""
    counter = CompileCounterWithBackend("eager")
    compiled: Callable[..., Any] = torch.compile(selective_scan, fullgraph=True, backend=counter)
    counts = []
    for seed in range(20):
        cu_seqlens, max_len = padded_cumulative(random_lengths(24, 3 + seed % 2, seed))
        tensors = make(1, 24, dtype=torch.float32, n_seq=4, seed=seed)
        options = {"cu_seqlens": cu_seqlens, "max_len": max_len, "dt_softplus": True, "backend": "portable"}
        assert_same_run(run(compiled, tensors, **options), run(selective_scan, tensors, **options), 1e-5)
        counts.append((max_len, counter.frame_count))
    assert len({max_len for max_len, _ in counts}) > 1
    assert counts[-1][1] == counts[5][1] <= 3


@pytest.mark.usefixtures("small_graph")
@pytest.mark.parametrize(
    ("backend", "lengths"), [("portable", None), ("portable", [5, 0, 4]), ("reference", None)]
)
def test_compiled_gradients(backend: str, lengths: list[int] | None) -> None:
    """Forward and backward as graphs of plain operations."""
    compiled: Callable[..., Any] = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    tensors = make(1, 9, dtype=torch.float32, n_seq=1 if lengths is None else 3)
    options: dict[str, Any] = {"dt_softplus": True, "backend": backend}
    if lengths is not None:
        options |= {"cu_seqlens": cumulative(lengths), "max_len": 8}
    assert_same_run(run(compiled, tensors, **options), run(selective_scan, tensors, **options), 1e-5)


def test_errors() -> None:
    tensors = make(2, 5)
    wrong = {
        "x": torch.zeros(5, 4),
        "dt": torch.zeros(2, 5, 3),
        "A": torch.zeros(5, 3),
        "B": torch.zeros(2, 5, 4),
        "C": torch.zeros(2, 4, 3),
        "D": torch.zeros(3),
        "z": torch.zeros(2, 5),
        "dt_bias": torch.zeros(3),
        "initial_state": torch.zeros(1, 4, 3),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"selective_scan: {name} has shape .* expected \("):
            selective_scan(**tensors | {name: value})
    with pytest.raises(ValueError, match="3 groups of B and C, expected a divisor of the 4 channels"):
        selective_scan(**make(2, 5, groups=3))
    with pytest.raises(ValueError, match="one row"):
        selective_scan(**tensors, cu_seqlens=cumulative([5, 5]), max_len=5)
    with pytest.raises(PlaitError, match="backend"):
        selective_scan(**tensors, backend="nonsense")
