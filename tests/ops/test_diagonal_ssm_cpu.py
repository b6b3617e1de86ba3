"""The Numba backend of the diagonal model: against the float64 reference, packing, threads, as a torch custom op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.ops import dispatch
from plait.ops.diagonal_ssm import DIAGONAL_SSM, cpu, diagonal_ssm
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
from tests.ops.test_diagonal_ssm import call, make

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
KINDS = [False, True]


def on_cpu(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(call, tensors, backend="cpu", **options)


def reference(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(call, to_double(tensors), backend="reference", **options)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@few
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    """Channels and states that no tile divides; memories of one to a thousand steps."""
    seed = data.draw(st.integers(0, 99), "seed")
    length = data.draw(st.sampled_from([1, 2, 31, 32, 33, 65, 150]), "length")
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {}
    if data.draw(st.booleans(), "packed"):
        options = {"cu_seqlens": cumulative(random_lengths(length, count, seed)), "max_len": length}
    else:
        count = min(count, 3)
    tensors = make(
        1 if options else count,
        length,
        complex=data.draw(st.booleans(), "complex"),
        channels=data.draw(st.sampled_from([1, 7, 16, 37]), "channels"),
        states=data.draw(st.sampled_from([1, 2, 3, 4, 6, 16]), "states"),
        dtype=torch.float32,
        n_seq=count,
        seed=seed,
    )
    for name in data.draw(st.sets(st.sampled_from(["D", "initial_state"])), "left out"):
        tensors[name] = None
    assert_same_run(on_cpu(tensors, **options), reference(tensors, **options), 1e-5)


@pytest.mark.parametrize("complex", KINDS)
@pytest.mark.parametrize("strength", [1e-6, 1e-3, 5.0, 40.0, 120.0])
def test_decays_of_any_strength(strength: float, complex: bool) -> None:
    tensors = make(1, 200, complex=complex, dtype=torch.float32)
    dA = tensors["dA"]
    assert dA is not None
    (dA[..., 0] if complex else dA).copy_(-strength * (0.5 + torch.rand(dA.shape[:2])))
    got, want = on_cpu(tensors), reference(tensors)
    if strength > 80:  # of e^-100 float32 keeps few digits, or none
        assert_close(got.grads.pop("dA"), torch.zeros_like(dA), 1e-20)
        want.grads.pop("dA")
        assert_close(got.grads.pop("initial_state"), want.grads["initial_state"] * 0, 1e-20)
        want.grads.pop("initial_state")
    assert_same_run(got, want, 1e-5)


def test_long_angles_keep_their_digits() -> None:
    """Slow decay, fast turning: what float32 rounds in one step's decay would count at each of 2000."""
    tensors = make(1, 2000, complex=True, dtype=torch.float32)
    tensors["dA"][..., 0] = -1e-5  # type: ignore[index]
    tensors["dA"][..., 1] += 30  # type: ignore[index]
    assert_same_run(on_cpu(tensors), reference(tensors), 4e-6)


@pytest.mark.parametrize("complex", KINDS)
def test_half_precision_reads_and_writes_its_own(complex: bool) -> None:
    """Only what is read and written is rounded: the error is that of rounding the result once."""
    tensors = make(2, 70, complex=complex, channels=20, dtype=torch.float32)
    tensors["x"] = tensors["x"].bfloat16()  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = on_cpu(tensors)
    want = reference(tensors)
    assert got.outputs[0].dtype == torch.bfloat16 and got.outputs[1].dtype == torch.float32
    assert rms_error(got.outputs[0], want.outputs[0]) < 0.6 * 2**-8
    assert_close(got.outputs[1], want.outputs[1], 1e-5)
    # the loss weighs y in bfloat16: its gradient is that of another weighting
    assert_same_run(got, want, 6e-3)


def test_any_strides() -> None:
    tensors = make(2, 40, complex=True, channels=20, dtype=torch.float32)
    want = on_cpu(tensors)
    x = tensors["x"]
    assert x is not None
    wide = torch.full((2, 40, 60), float("nan"))
    wide[..., 20:40] = x
    for given_as in (wide[..., 20:40], x.transpose(1, 2).contiguous().transpose(1, 2)):
        with torch.no_grad():
            y, final = call(**(tensors | {"x": given_as}), backend="cpu")  # type: ignore[arg-type]
        assert torch.equal(y, want.outputs[0]) and torch.equal(final, want.outputs[1])


@pytest.mark.parametrize("lengths", [[2048], [900, 3, 0, 645, 500]])
def test_the_number_of_threads_changes_no_bit(lengths: list[int], threads: None) -> None:
    tensors = make(1, 2048, complex=True, channels=48, dtype=torch.float32, n_seq=len(lengths))
    runs = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        runs.append(on_cpu(tensors, cu_seqlens=cumulative(lengths)))
    for other in runs[1:]:
        assert_same_run(other, runs[0], 0.0)


@pytest.mark.parametrize("complex", KINDS)
def test_nothing_of_one_document_reaches_another(complex: bool) -> None:
    lengths = [40, 0, 33, 1, 30]
    tensors = make(1, sum(lengths), complex=complex, channels=20, dtype=torch.float32, n_seq=5)
    tensors["x"][0, 40:73] = float("nan")  # type: ignore[index]
    tensors["initial_state"][2] = float("nan")  # type: ignore[index]
    got = on_cpu(tensors, cu_seqlens=cumulative(lengths))
    y, final = got.outputs
    assert y[0, 40:73].isnan().all() and final[2].isnan().all()
    others = [*range(40), *range(73, 104)]
    assert not y[0, others].isnan().any() and not final[[0, 1, 3, 4]].isnan().any()
    assert not got.grads["x"][0, others].isnan().any()
    assert not got.grads["initial_state"][[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("complex", KINDS)
def test_no_tokens_and_no_sequences(complex: bool) -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 5, 0, None),
        (1, 0, 3, cumulative([0, 0, 0])),
        (1, 9, 4, cumulative([0, 9, 0, 0])),
    ]:
        tensors = make(rows, length, complex=complex, dtype=torch.float32, n_seq=n_seq)
        got = on_cpu(tensors, cu_seqlens=cu)
        before = tensors["initial_state"]
        kept = [0, 2, 3] if n_seq == 4 else list(range(n_seq))
        assert before is not None and torch.equal(got.outputs[1][kept], before[kept])
        assert got.outputs[0].shape == (rows, length, 4)
        assert_same_run(got, reference(tensors, cu_seqlens=cu), 1e-5)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory that holds NaN when it is given out."""
    tensors = make(1, 104, complex=True, channels=19, dtype=torch.float32, n_seq=5)
    options: dict[str, Any] = {"cu_seqlens": cumulative([40, 0, 33, 1, 30])}
    want = on_cpu(tensors, **options)
    new_empty = Tensor.new_empty
    poisoned = []

    def poison(self: Tensor, *a: Any, **k: Any) -> Tensor:
        poisoned.append(new_empty(self, *a, **k).fill_(float("nan")))
        return poisoned[-1]

    monkeypatch.setattr(Tensor, "new_empty", poison)
    got = on_cpu(tensors, **options)
    assert len(poisoned) >= 9
    assert_same_run(got, want, 0.0)


def test_is_a_correct_custom_op() -> None:
    tensors = make(1, 70, complex=True, dtype=torch.float32, n_seq=2)
    full = [t.requires_grad_() for t in tensors.values() if t is not None]
    bounds = cumulative([66, 4])
    torch.library.opcheck(cpu._forward, (*full, bounds, True))
    torch.library.opcheck(cpu._forward, (*full[:4], None, None, None, True))
    detached = [t.detach() for t in full]
    marks = cpu._forward(*detached, bounds, True)[2]
    torch.library.opcheck(cpu._backward, (torch.ones(1, 70, 4), None, *detached, bounds, marks))
    with pytest.raises(RuntimeError, match="told not to keep"):
        cpu._backward(torch.ones(1, 70, 4), None, *detached, bounds, marks[:0])


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(packed: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        options = {"cu_seqlens": cumulative([9 + seed, 0, 1, 70 - seed]), "max_len": 128} if packed else {}
        tensors = make(1, 80, complex=True, dtype=torch.float32, n_seq=4 if packed else 1, seed=seed)
        assert_same_run(run(compiled, tensors, backend="cpu", **options), on_cpu(tensors, **options), 0.0)


def test_automatic_takes_it_but_not_for_float64() -> None:
    assert dispatch.choose_name(DIAGONAL_SSM, None, "cpu", torch.bfloat16) == "cpu"
    assert dispatch.choose_name(DIAGONAL_SSM, None, "cpu", torch.float64) == "portable"


@pytest.mark.parametrize("cu", [[0, 5, 9], [1, 5, 10], [0, 7, 5, 10]])
def test_refuses_documents_that_do_not_tile_the_row(cu: list[int]) -> None:
    tensors = make(1, 10, complex=True, dtype=torch.float32, n_seq=len(cu) - 1)
    with pytest.raises(ValueError, match="must begin with 0, never fall and end with 10"):
        call(**tensors, cu_seqlens=torch.tensor(cu), backend="cpu")  # type: ignore[arg-type]


def test_complex_leaves() -> None:
    """Gradients of complex parameters are those of their parts."""
    tensors = make(2, 40, complex=True, dtype=torch.float32)
    parts = on_cpu(tensors)
    leaves = {k: torch.view_as_complex(tensors[k]).clone().requires_grad_() for k in ("dA", "B", "C")}  # type: ignore[arg-type]
    rest = {k: tensors[k] for k in ("x", "D", "initial_state")}
    y, final = diagonal_ssm(**rest, **leaves, backend="cpu")  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    loss = sum((t * torch.randn(t.shape, generator=draw, dtype=torch.float64)).sum() for t in (y, final))
    for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):  # type: ignore[arg-type]
        assert_close(torch.view_as_real(grad), parts.grads[name], 1e-6)
