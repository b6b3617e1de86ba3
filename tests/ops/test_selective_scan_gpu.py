"""The Triton backend of the selective scan against the float64 recurrence; without a GPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops.selective_scan import gpu, gpu_step, selective_scan
from plait.ops.triton_support import INTERPRET
from tests.ops.helpers import Run, assert_close, assert_same_run, cumulative, run, to_double
from tests.ops.test_selective_scan import leave_out, make

DEVICE = "cpu" if INTERPRET.value else "cuda"
TOKENS = ("x", "dt", "z")
LENGTHS = [3, 0, 9, 0, 4]
"""Documents that share tiles of eight tokens, end on one, and are empty. Small: the interpreter is slow."""

Tensors = dict[str, Tensor | None]


def draw(*args: Any, **options: Any) -> Tensors:
    return {
        k: None if t is None else t.to(DEVICE) for k, t in make(*args, dtype=torch.float32, **options).items()
    }


def time_order(t: Tensor) -> Tensor:
    """The same numbers with tokens side by side."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def on_gpu(tensors: Tensors, order: str = "channels", **options: Any) -> Run:
    """Run the kernels on x, dt and z in this memory order."""

    def scan(**leaves: Tensor | None) -> Any:
        if order == "time":
            leaves |= {k: time_order(t) for k in TOKENS if (t := leaves.get(k)) is not None}
        return selective_scan(**leaves, backend="gpu", **options)  # type: ignore[arg-type]

    return run(scan, tensors)


def check(tensors: Tensors, order: str = "channels", tolerance: float = 1e-5, **options: Any) -> None:
    want = run(selective_scan, to_double(tensors), backend="reference", **options)
    assert_same_run(on_gpu(tensors, order, **options), want, tolerance)


@pytest.fixture(autouse=True)
def new_plans() -> Iterator[None]:
    """Plans are kept for calls alike, but these tests change what plans are made from."""
    gpu.plans.clear()
    yield
    gpu.plans.clear()


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are cut into as many segments as they have tiles; without this these lengths stay whole."""
    monkeypatch.setattr(gpu, "SHORTEST", 1)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", ["time", "channels"])
def test_equals_the_reference(order: str) -> None:
    """dt from 1e-6 to 20, rates up to 16, lengths, channels and states that nothing divides, NaN in new memory."""
    assert torch.empty(3, device=DEVICE).isnan().all()
    check(draw(2, 11, 5, 3), order)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shortest", "length", "count"), [(1, 21, 3), (14, 29, 2), (1, 45, 6)])
def test_segments(shortest: int, length: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one tile and of two, and more of them than are gone through at a time."""
    monkeypatch.setattr(gpu, "SHORTEST", shortest)
    tensors = draw(1, length, 3, 3)
    assert gpu.plan(tensors["x"], tensors["A"], tensors["B"], None, length).items == count  # type: ignore[arg-type]
    check(tensors)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("states", "width"), [(1, 32), (2, 64), (4, 64)])
def test_softplus_and_every_shape_of_kernel(states: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of any sign, one or more states at a time, one or two channels a lane, two blocks of channels."""
    for key in gpu.CONFIGS:
        count = min(states, 2) if key == "reverse" else states
        monkeypatch.setitem(gpu.CONFIGS, key, gpu.Config(count, width))
    tensors = draw(1, 5, width + 3, 3, seed=states)
    assert tensors["dt"] is not None
    tensors["dt"] = tensors["dt"].log()
    check(tensors, dt_softplus=True)


@pytest.mark.usefixtures("segments")
def test_many_states() -> None:
    """More than one chunk of what the tensor cores add at once."""
    check(draw(1, 9, 2, 18), "time")


@pytest.mark.parametrize(("groups", "channels"), [(1, 3), (2, 6)])
def test_groups(groups: int, channels: int) -> None:
    check(draw(1, 5, channels, 4, groups), dt_softplus=True)


@pytest.mark.parametrize("without", [{"D", "z", "dt_bias", "initial_state"}, {"z"}, {"D", "initial_state"}])
def test_without_options(without: set[str]) -> None:
    check(leave_out(draw(1, 5, 3, 2), without))


@pytest.mark.usefixtures("poisoned")
def test_packed() -> None:
    tensors = draw(1, sum(LENGTHS), 3, 2, n_seq=len(LENGTHS))
    check(tensors, "time", cu_seqlens=cumulative(LENGTHS).to(DEVICE), max_len=13)


@pytest.mark.usefixtures("poisoned", "segments")
def test_packed_segments_of_groups_without_a_bound() -> None:
    tensors = draw(1, sum(LENGTHS), 2, 2, 2, n_seq=len(LENGTHS), seed=1)
    check(tensors, cu_seqlens=cumulative(LENGTHS, torch.int64).to(DEVICE))


@pytest.mark.usefixtures("segments")
def test_no_path_over_a_boundary() -> None:
    """A document of NaN in every input of a token shares its tiles with others, and its NaN with nobody."""
    n = sum(LENGTHS)
    bad = torch.zeros(1, n, dtype=torch.bool, device=DEVICE)
    bad[:, sum(LENGTHS[:2]) : sum(LENGTHS[:3])] = True
    tensors = draw(1, n, 2, 2, n_seq=len(LENGTHS))
    leaves = {}
    for name in (*TOKENS, "B", "C"):
        t = tensors[name]
        assert t is not None
        leaves[name] = tensors[name] = t.masked_fill(bad.unsqueeze(2), float("nan")).requires_grad_()
    options: dict[str, Any] = {"cu_seqlens": cumulative(LENGTHS).to(DEVICE), "max_len": n, "backend": "gpu"}
    y, final = selective_scan(**tensors, **options)  # type: ignore[arg-type]
    assert torch.equal(y.isnan().any(2), bad)
    assert final.isnan().flatten(1).any(1).nonzero().view(-1).tolist() == [2]
    (y.sum() + final.sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad.isnan().any(2), bad), name


def test_any_strides() -> None:
    """Every second channel of a wide tensor, a broadcast B, a reversed batch, a transposed A and state."""
    tensors = draw(2, 5, 3, 4)
    want = on_gpu(tensors)

    def scan(A: Tensor, B: Tensor, initial_state: Tensor, **rest: Tensor) -> Any:
        wide = {k: torch.stack([rest.pop(k)] * 2, 3).flatten(2)[:, :, ::2] for k in TOKENS}
        return selective_scan(
            **wide,
            **rest,
            A=A.t().contiguous().t(),
            B=B.transpose(1, 2).contiguous().transpose(1, 2),
            initial_state=initial_state.transpose(1, 2).contiguous().transpose(1, 2),
            backend="gpu",
        )  # type: ignore[arg-type]

    assert_same_run(run(scan, tensors), want, 1e-6)
    tensors["B"] = tensors["B"][:, :1].expand(2, 5, 4)  # type: ignore[index]
    check(tensors)


def test_a_gradient_of_one_output_alone() -> None:
    tensors = draw(1, 5, 3, 2)
    for index in (0, 1):

        def one(index: int = index, **leaves: Any) -> Tensor:
            backend = "gpu" if leaves["x"].dtype == torch.float32 else "reference"
            return selective_scan(**leaves, backend=backend)[index]

        assert_same_run(run(one, tensors), run(one, to_double(tensors)), 1e-5)


@pytest.mark.parametrize("without", [set(), {"D", "z", "dt_bias", "initial_state"}])
def test_one_token_is_a_step(without: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(gpu_step, "step", lambda *a, step=gpu_step.step: steps.append(1) or step(*a))
    for groups, states in ((None, 5), (2, 16)):
        tensors = leave_out(draw(3, 1, 70, states, groups), without)
        for options in ({}, {"dt_softplus": True}):
            got = selective_scan(**tensors, backend="gpu", **options)  # type: ignore[arg-type]
            want = selective_scan(**to_double(tensors), backend="reference", **options)  # type: ignore[arg-type]
            for a, b in zip(got, want, strict=True):
                assert_close(a, b, 1e-6)
    assert len(steps) == 4


def test_nothing_to_do() -> None:
    for rows, length in [(2, 0), (0, 5), (0, 1), (2, 1)]:
        tensors = draw(rows, length, 4, 3)
        y, final = selective_scan(**tensors, backend="gpu")  # type: ignore[arg-type]
        assert y.shape == (rows, length, 4) and final.dtype == torch.float32
        if length == 0:
            assert torch.equal(final, tensors["initial_state"])  # type: ignore[arg-type]
    tensors = draw(2, 0, 4, 3)
    got = on_gpu(tensors)
    assert torch.equal(got.outputs[1], tensors["initial_state"])  # type: ignore[arg-type]
    assert got.grads["initial_state"].abs().min() > 0 and not got.grads["A"].any()
    for lengths in ([0, 0], []):
        tensors = draw(1, 0, 4, 3, n_seq=len(lengths))
        bounds = cumulative(lengths).to(DEVICE)
        _, final = selective_scan(**tensors, cu_seqlens=bounds, max_len=0, backend="gpu")  # type: ignore[arg-type]
        assert torch.equal(final, tensors["initial_state"])  # type: ignore[arg-type]


def test_half_precision() -> None:
    """float16 in: y float16, the state float32; gradients in the inputs' dtypes."""
    tensors = draw(1, 7, 3, 4)
    half = {k: t.half() if k in (*TOKENS, "B", "C") else t for k, t in tensors.items() if t is not None}
    got = on_gpu(half, "time", dt_softplus=True)  # type: ignore[arg-type]
    want = run(selective_scan, to_double(half), dt_softplus=True, backend="reference")  # type: ignore[arg-type]
    assert [t.dtype for t in got.outputs] == [torch.float16, torch.float32]
    assert all(got.grads[k].dtype == t.dtype for k, t in half.items())
    assert_same_run(got, want, 1e-3)
    assert_close(got.outputs[1], want.outputs[1], 1e-6)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendError, match="float64"):
        selective_scan(**to_double(draw(1, 3, 2, 2)), backend="gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True])
def test_torch_sees_proper_ops(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes, gradients and registration of the forward, backward and step ops."""
    monkeypatch.setattr(gpu, "SHORTEST", 1)
    tensors = draw(1, 9, 2, 2, n_seq=2 if packed else 1)
    bounds = cumulative([0, 9]).to(DEVICE) if packed else None
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    leaves = [tensors[n].requires_grad_() for n in names]  # type: ignore[union-attr]
    args = (*leaves, bounds, True, 9)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gpu.SCAN.forward, (*args, True), test_utils=checks)
    y, final, kept = gpu.SCAN.forward(*args, True)
    assert kept.numel() > 0
    plain = [t.detach() for t in leaves]
    given = (torch.ones_like(y), torch.ones_like(final), *plain, bounds, True, 9, kept)
    torch.library.opcheck(gpu.SCAN.backward, given, test_utils=checks)
    if not packed:
        one = [
            t[:, :1] if t.dim() == 3 and n != "initial_state" else t
            for n, t in zip(names, plain, strict=True)
        ]
        torch.library.opcheck(gpu_step.step, (*one, True))


def test_compiled_whole() -> None:
    compiled: Callable[..., Any] = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    tensors = draw(1, 5, 2, 2)
    options: dict[str, Any] = {"dt_softplus": True, "backend": "gpu"}
    assert_same_run(run(compiled, tensors, **options), run(selective_scan, tensors, **options), 0.0)
