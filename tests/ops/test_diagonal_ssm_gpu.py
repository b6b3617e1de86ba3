"""The Triton backend of the diagonal model in Triton's interpreter: against the float64 reference, chunks, packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops import dispatch
from tests.ops.helpers import assert_close, assert_same_run, cumulative, run, to_double
from tests.ops.test_diagonal_ssm import call, make

pytest.importorskip("triton", reason="not on this platform")

from plait.ops.diagonal_ssm import DIAGONAL_SSM, gpu
from tests.ops.interpreter import needs_interpreter, poisoned

pytestmark = needs_interpreter
__all__ = ["poisoned"]
LENGTHS = [3, 0, 50, 0, 19, 33]
"""Documents that are empty, lie in one chunk with others, go over three chunks, and end with one."""


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 tokens."""
    monkeypatch.setattr(gpu, "SHORTEST", 32)
    gpu.plans.clear()


def check(tensors: dict[str, Tensor | None], tolerance: float = 1e-5, **options: Any) -> None:
    want = run(call, to_double(tensors), backend="reference", **options)
    assert_same_run(run(call, tensors, backend="gpu", **options), want, tolerance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize(
    ("rows", "length", "channels", "states"), [(2, 7, 3, 2), (1, 85, 3, 3), (1, 17, 35, 1), (1, 32, 2, 2)]
)
def test_equals_the_reference(rows: int, length: int, channels: int, states: int, complex: bool) -> None:
    """One tile and many, one chunk and three, two blocks of channels; memories of one to a thousand steps."""
    check(make(rows, length, complex=complex, channels=channels, states=states, dtype=torch.float32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("without", [(), ("D", "initial_state")])
def test_packed(complex: bool, without: tuple[str, ...]) -> None:
    tensors = make(
        1, sum(LENGTHS), complex=complex, dtype=torch.float32, channels=3, states=2, n_seq=len(LENGTHS)
    )
    tensors |= dict.fromkeys(without)
    check(tensors, cu_seqlens=cumulative(LENGTHS), max_len=64)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("strength", [1e-6, 5.0, 40.0])
def test_decays_of_any_strength(strength: float, complex: bool) -> None:
    tensors = make(1, 70, complex=complex, dtype=torch.float32, channels=2, states=2)
    dA = tensors["dA"]
    assert dA is not None
    (dA[..., 0] if complex else dA).copy_(-strength * (0.5 + torch.rand(dA.shape[:2])))
    check(tensors)


def test_long_angles_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow decay, fast turning, one chunk: what float32 rounds in one step's decay would count at each of 400."""
    monkeypatch.setattr(gpu, "SHORTEST", 512)
    tensors = make(1, 400, complex=True, dtype=torch.float32, channels=32, states=1)
    tensors["dA"][..., 0] = -1e-5  # type: ignore[index]
    tensors["dA"][..., 1] += 30  # type: ignore[index]
    tensors["x"].zero_()  # type: ignore[union-attr]
    final = call(**tensors, backend="gpu")[1]  # type: ignore[arg-type]
    # with that rounding: 3e-6
    assert_close(final, call(**to_double(tensors), backend="reference")[1], 1.5e-6)  # type: ignore[arg-type]


def test_nothing_of_one_document_reaches_another() -> None:
    tensors = make(
        1, sum(LENGTHS), complex=True, dtype=torch.float32, channels=2, states=1, n_seq=len(LENGTHS)
    )
    tensors["x"][0, 3:53] = float("nan")  # type: ignore[index]
    tensors["initial_state"][2] = float("nan")  # type: ignore[index]
    got = run(call, tensors, backend="gpu", cu_seqlens=cumulative(LENGTHS))
    y, final = got.outputs
    others, kept = [*range(3), *range(53, sum(LENGTHS))], [0, 1, 3, 4, 5]
    assert y[0, 3:53].isnan().all() and final[2].isnan().all()
    assert not y[0, others].isnan().any() and not final[kept].isnan().any()
    assert not got.grads["x"][0, others].isnan().any() and not got.grads["initial_state"][kept].isnan().any()
    before = tensors["initial_state"]
    assert before is not None and torch.equal(final[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("complex", [False, True])
def test_no_tokens_and_no_sequences(complex: bool) -> None:
    for rows, length, n_seq, cu in [(2, 0, 2, None), (0, 5, 0, None), (1, 0, 2, cumulative([0, 0]))]:
        tensors = make(rows, length, complex=complex, dtype=torch.float32, n_seq=n_seq)
        check(tensors, cu_seqlens=cu)


def test_half_precision_and_any_strides() -> None:
    """float16 in and out, every second channel of a wider tensor: only what is read and written is rounded."""
    tensors = make(2, 20, complex=True, channels=4, states=2, dtype=torch.float32)
    tensors["x"] = tensors["x"].half()  # type: ignore[union-attr]
    want = run(call, to_double(tensors), backend="reference")

    def strided(x: Tensor, **rest: Any) -> Any:
        return call(torch.stack([x, x], 3).flatten(2)[..., ::2], **rest, backend="gpu")

    got = run(strided, tensors)
    assert [t.dtype for t in got.outputs] == [torch.float16, torch.float32]
    assert got.grads["x"].dtype == torch.float16
    assert_same_run(got, want, 1e-3)


def test_a_gradient_of_one_output_alone() -> None:
    tensors = make(1, 40, complex=True, channels=2, states=2, dtype=torch.float32)
    for index in (0, 1):

        def one(index: int = index, **leaves: Any) -> Tensor:
            return call(**leaves, backend="gpu" if leaves["x"].dtype == torch.float32 else "reference")[index]

        assert_same_run(run(one, tensors), run(one, to_double(tensors)), 1e-5)


def test_two_runs_are_equal() -> None:
    tensors = make(1, 70, complex=True, channels=3, states=2, dtype=torch.float32)
    assert_same_run(run(call, tensors, backend="gpu"), run(call, tensors, backend="gpu"), 0.0)


def test_is_a_correct_custom_op() -> None:
    tensors = make(1, 20, complex=True, channels=2, states=2, dtype=torch.float32, n_seq=2)
    leaves = [tensors[n].requires_grad_() for n in ("x", "dA", "B", "C", "D", "initial_state")]  # type: ignore[union-attr]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    bounds = cumulative([4, 16])
    torch.library.opcheck(gpu.DIAGONAL.forward, (*leaves, bounds), test_utils=checks)
    plain = [t.detach() for t in leaves]
    given = (torch.randn(1, 20, 2), torch.randn(2, 2, 2, 2), *plain, bounds)
    torch.library.opcheck(gpu.DIAGONAL.backward, given, test_utils=checks)


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = make(1, 20, complex=True, channels=2, states=2, dtype=torch.float32)
    assert_same_run(run(compiled, tensors, backend="gpu"), run(call, tensors, backend="gpu"), 0.0)


def test_automatic_takes_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_why_no_gpu", lambda: "")
    assert dispatch.choose_name(DIAGONAL_SSM, None, "cuda", torch.bfloat16) == "gpu"
    assert dispatch.choose_name(DIAGONAL_SSM, None, "cuda", torch.float64) == "portable"
