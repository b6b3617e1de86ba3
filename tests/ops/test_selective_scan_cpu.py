"""The Numba backend of the selective scan: against the float64 reference, and as a torch custom op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.ops import dispatch
from plait.ops.selective_scan import SELECTIVE_SCAN, cpu, selective_scan
from tests.ops.helpers import assert_same_run, cumulative, random_lengths, run, to_double
from tests.ops.test_selective_scan import OPTIONAL, leave_out, make

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def against_reference(tensors: dict[str, Tensor | None], tolerance: float = 1e-5, **options: Any) -> None:
    got = run(selective_scan, tensors, backend="cpu", **options)
    want = run(selective_scan, to_double(tensors), backend="reference", **options)
    assert_same_run(got, want, tolerance)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@few
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    """dt from 1e-6 to 20: decays from none to all; channels and states that no tile divides."""
    groups = data.draw(st.sampled_from([None, 1, 2, 3]), "groups")
    seed = data.draw(st.integers(0, 99), "seed")
    packed = data.draw(st.booleans(), "packed")
    length = data.draw(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 200, 257]), "length")
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {"dt_softplus": data.draw(st.booleans(), "softplus")}
    if packed:
        options |= {"cu_seqlens": cumulative(random_lengths(length, count, seed)), "max_len": length}
    else:
        count = min(count, 3)
    tensors = make(
        1 if packed else count,
        length,
        (groups or 1) * data.draw(st.sampled_from([1, 7, 16, 37]), "channels a group"),
        data.draw(st.sampled_from([1, 3, 8, 16, 20, 64]), "states"),
        groups,
        torch.float32,
        count,
        seed,
    )
    absent = data.draw(st.sets(st.sampled_from(OPTIONAL)), "left out")
    against_reference(leave_out(tensors, absent), **options)


@pytest.mark.parametrize("shift", [-14.0, -3.0, 3.0, 25.0, 80.0])
def test_softplus_over_its_whole_range(shift: float) -> None:
    tensors = make(2, 70, 20, 16, dtype=torch.float32)
    tensors["dt"] = torch.randn(2, 70, 20)
    tensors["dt_bias"] = torch.full((20,), shift)
    tensors["A"] = -torch.rand(20, 16) * (0.5 if shift < 0 else 0.5 / shift)
    against_reference(tensors, dt_softplus=True)


def test_gates_far_from_zero() -> None:
    """A gate that is shut gives zero and no NaN, one that is open passes."""
    tensors = make(1, 40, 16, 16, dtype=torch.float32)
    z = tensors["z"]
    assert z is not None
    tensors["z"] = z.sign() * torch.logspace(-3, 3, 40)[None, :, None]
    against_reference(tensors, dt_softplus=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_and_writes_its_own(dtype: torch.dtype) -> None:
    """Only what is read and written is rounded: the error is that of rounding the result once."""
    tensors = make(2, 130, 40, 16, dtype=torch.float32)
    narrow = {
        k: t if t is None or k in ("A", "D", "dt_bias", "initial_state") else t.to(dtype)
        for k, t in tensors.items()
    }
    got = run(selective_scan, narrow, backend="cpu", dt_softplus=True)
    want = run(selective_scan, to_double(narrow), backend="reference", dt_softplus=True)
    assert got.outputs[0].dtype == dtype and got.outputs[1].dtype == torch.float32
    assert_same_run(got, want, 0.6 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["x", "dt", "z", "B", "C"])
def test_any_strides(name: str) -> None:
    """Slices of one projection, and time side by side instead of channels."""
    tensors = make(2, 70, 20, 16, dtype=torch.float32)
    want = run(selective_scan, tensors, backend="cpu")
    t = tensors[name]
    assert t is not None
    wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), float("nan"))
    wide[..., t.shape[-1] : 2 * t.shape[-1]] = t
    for given_as in (
        wide[..., t.shape[-1] : 2 * t.shape[-1]],
        t.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        with torch.no_grad():
            y, final = selective_scan(**(tensors | {name: given_as}), backend="cpu")  # type: ignore[arg-type]
        assert torch.equal(y, want.outputs[0]) and torch.equal(final, want.outputs[1])


@pytest.mark.parametrize("lengths", [[4096], [900, 3, 0, 1500, 1200, 493]])
def test_the_number_of_threads_changes_no_bit(lengths: list[int], threads: None) -> None:
    tensors = make(1, 4096, 48, 16, dtype=torch.float32, n_seq=len(lengths))
    options: dict[str, Any] = {"cu_seqlens": cumulative(lengths), "dt_softplus": True}
    runs = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        runs.append(run(selective_scan, tensors, backend="cpu", **options))
    for other in runs[1:]:
        assert_same_run(other, runs[0], 0.0)


def test_nan_in_one_document_stays_there() -> None:
    lengths = [70, 0, 65, 1, 30]
    tensors = make(1, 166, 20, 16, dtype=torch.float32, n_seq=5)
    options: dict[str, Any] = {"cu_seqlens": cumulative(lengths), "backend": "cpu", "dt_softplus": True}
    want_y, want_final = selective_scan(**tensors, **options)  # type: ignore[arg-type]
    x = tensors["x"]
    assert x is not None
    x[0, 80] = float("nan")
    y, final = selective_scan(**tensors, **options)  # type: ignore[arg-type]
    assert y[0, 80:135].isnan().all()
    assert torch.equal(y[0, :80], want_y[0, :80]) and torch.equal(y[0, 135:], want_y[0, 135:])
    others = [0, 1, 3, 4]
    assert final[2].isnan().all() and torch.equal(final[others], want_final[others])


def test_a_document_without_tokens_keeps_its_state() -> None:
    tensors = make(1, 9, 20, 5, dtype=torch.float32, n_seq=3)
    _, final = selective_scan(**tensors, cu_seqlens=cumulative([4, 0, 5]), backend="cpu")  # type: ignore[arg-type]
    given_state = tensors["initial_state"]
    assert given_state is not None and torch.equal(final[1], given_state[1])


def test_is_a_correct_custom_op() -> None:
    tensors = make(1, 70, 20, 5, dtype=torch.float32, n_seq=2)
    order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    full = [t.requires_grad_() for name in order if (t := tensors[name]) is not None]
    rest = (cumulative([66, 4]), True)
    torch.library.opcheck(cpu._forward, (*full, *rest, True))
    x, dt, A, B, C, *_ = full
    torch.library.opcheck(cpu._forward, (x, dt, A, B, C, None, None, None, None, None, False, True))
    detached = [t.detach() for t in full]
    marks = cpu._forward(*detached, *rest, True)[2]
    torch.library.opcheck(cpu._backward, (torch.ones(1, 70, 20), None, *detached, *rest, marks))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(packed: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        lengths = [9 + seed, 0, 1, 70 - seed]
        tensors = make(
            1 if packed else 2, 80, 20, 5, dtype=torch.float32, n_seq=4 if packed else 2, seed=seed
        )
        options = {"cu_seqlens": cumulative(lengths), "max_len": 128} if packed else {}
        got = run(compiled, tensors, dt_softplus=True, backend="cpu", **options)
        assert_same_run(got, run(selective_scan, tensors, dt_softplus=True, backend="cpu", **options), 0.0)


def test_saves_nothing_when_no_gradient_is_wanted() -> None:
    tensors = make(1, 200, 20, 5, dtype=torch.float32)
    order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    inputs = (*(tensors[name] for name in order), None, False)
    assert cpu._forward(*inputs, True)[2].numel() > 0
    marks = cpu._forward(*inputs, False)[2]
    assert marks.numel() == 0
    with pytest.raises(RuntimeError, match="told not to keep"):
        cpu._backward(tensors["x"], None, *inputs, marks)


def test_automatic_takes_it_but_not_for_float64() -> None:
    assert dispatch.choose_name(SELECTIVE_SCAN, None, "cpu", torch.bfloat16) == "cpu"
    assert dispatch.choose_name(SELECTIVE_SCAN, None, "cpu", torch.float64) == "portable"


@pytest.mark.parametrize("cu", [[0, 5, 9], [1, 5, 10], [0, 7, 5, 10]])
def test_refuses_documents_that_do_not_tile_the_row(cu: list[int]) -> None:
    tensors = make(1, 10, dtype=torch.float32, n_seq=len(cu) - 1)
    with pytest.raises(ValueError, match="must begin with 0, never fall and end with 10"):
        selective_scan(**tensors, cu_seqlens=torch.tensor(cu), backend="cpu")  # type: ignore[arg-type]
