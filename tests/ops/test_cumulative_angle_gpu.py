"""The Triton backend of the running angle in Triton's interpreter: against the float64 reference, chunks, the turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from plait.ops import dispatch
from tests.ops.helpers import assert_same_run, cumulative, run, to_double
from tests.ops.test_cumulative_angle import inputs, on_the_circle

pytest.importorskip("triton", reason="not on this platform")

from plait.ops.cumulative_angle import CUMULATIVE_ANGLE, cumulative_angle, gpu
from tests.ops.interpreter import needs_interpreter, poisoned

pytestmark = needs_interpreter
__all__ = ["poisoned"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of eight or sixteen tokens, so that short rows have several."""
    monkeypatch.setattr(gpu, "SHORTEST", 8)
    monkeypatch.setattr(gpu, "CHUNKS", 8)
    gpu.plans.clear()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rows", "lengths", "angles"),
    [
        (2, None, (2, 3)),
        (1, [5, 0, 1, 30, 0, 20, 13, 0], (2, 3)),
        (1, [8, 0, 16, 1], (5, 7)),
        (1, [70], (3, 22)),
    ],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_equals_the_reference(
    rows: int, lengths: list[int] | None, angles: tuple[int, int], from_zero: bool
) -> None:
    """Documents that begin, end and are empty inside a chunk, at its edge and over several; two blocks of angles."""
    torch.manual_seed(0)
    length, options = 37, {}
    count = rows
    if lengths is not None:
        length, count, options = (
            sum(lengths),
            len(lengths),
            {"cu_seqlens": cumulative(lengths), "max_len": 70},
        )
    tensors = {
        "step": 3 * torch.randn(rows, length, *angles),
        "initial_state": None if from_zero else 6 * torch.rand(count, *angles),
    }
    want = run(on_the_circle, to_double(tensors), backend="reference", **options)
    assert_same_run(run(on_the_circle, tensors, backend="gpu", **options), want, 1e-5)


def test_a_long_row_keeps_its_angle() -> None:
    """A float32 sum of so many steps is off by 1e-5."""
    step = torch.rand(1, 600, 4, 8, generator=torch.Generator().manual_seed(1)) * math.pi
    theta, final = cumulative_angle(step, backend="gpu")
    exact = step.double().cumsum(1)
    assert (theta.cos() - exact.cos()).abs().max() < 3e-7  # the plain sum: 3e-5
    assert torch.equal(final, theta[:, -1])


def test_stays_below_a_full_turn() -> None:
    for step in (-1e-9, -1e-7, -3e-7, 2 * math.pi, 2 * math.pi - 1e-6, 1e3, -1e3):
        for initial in (None, torch.full((1, 1, 1), -1e-9)):
            angles = cumulative_angle(torch.full((1, 20, 1, 1), step), initial_state=initial, backend="gpu")
            assert all(((angle >= 0) & (angle.double() < 2 * math.pi)).all() for angle in angles)


def test_an_empty_document_keeps_its_angle_and_nan_stays_in_its_own() -> None:
    tensors = inputs(1, 24, 4, torch.float32)
    step, initial = tensors["step"], tensors["initial_state"]
    assert step is not None and initial is not None
    initial[1, 0, 0] = -5.0  # kept as it is, also outside of [0, 2 pi)
    step[0, 6] = float("nan")
    theta, final = cumulative_angle(
        step, initial_state=initial, cu_seqlens=cumulative([5, 0, 14, 5]), max_len=14, backend="gpu"
    )
    assert torch.equal(final[1], initial[1])
    assert theta[0, 6:19].isnan().all() and final[2].isnan().all()
    assert not theta[0, [*range(6), *range(19, 24)]].isnan().any() and not final[[0, 1, 3]].isnan().any()


def test_no_tokens_and_no_sequences() -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 5, 0, None),
        (1, 0, 2, cumulative([0, 0])),
        (1, 0, 0, cumulative([])),
    ]:
        tensors = inputs(rows, length, n_seq, torch.float32)
        got = run(cumulative_angle, tensors, cu_seqlens=cu, max_len=None if cu is None else 0, backend="gpu")
        assert got.outputs[0].shape == (rows, length, 2, 3)
        assert torch.equal(got.outputs[1], tensors["initial_state"])  # type: ignore[arg-type]
        assert got.grads["initial_state"].shape == (n_seq, 2, 3)


def test_narrow_steps_and_any_strides() -> None:
    step = torch.randn(2, 3, 9, 2).half().permute(0, 2, 3, 1)
    got = run(on_the_circle, {"step": step}, backend="gpu")
    want = run(on_the_circle, to_double({"step": step}), backend="reference")
    assert [t.dtype for t in got.outputs] == [torch.float32] * 4 and got.grads["step"].dtype == torch.float16
    assert_same_run(got, want, 1e-5, 1e-3)


def test_a_gradient_of_one_output_alone() -> None:
    tensors = inputs(1, 20, 1, torch.float32)
    for index in (0, 1):

        def one(index: int = index, **leaves: Any) -> torch.Tensor:
            backend = "gpu" if leaves["step"].dtype == torch.float32 else "reference"
            return cumulative_angle(**leaves, backend=backend)[index]

        got, want = run(one, tensors), run(one, to_double(tensors))
        assert_same_run(got._replace(outputs=[]), want._replace(outputs=[]), 1e-5)


def test_is_a_correct_custom_op() -> None:
    step, initial = torch.randn(1, 20, 2, 3, requires_grad=True), torch.rand(2, 2, 3, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gpu.ANGLE.forward, (step, initial, cumulative([4, 16])), test_utils=checks)
    torch.library.opcheck(gpu.ANGLE.forward, (step, None, None), test_utils=checks)
    given = (
        torch.randn(1, 20, 2, 3),
        torch.randn(2, 2, 3),
        step.detach(),
        initial.detach(),
        cumulative([4, 16]),
    )
    torch.library.opcheck(gpu.ANGLE.backward, given, test_utils=checks)


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(on_the_circle, fullgraph=True, backend="aot_eager")
    tensors, options = inputs(1, 20, 3, torch.float32), {"cu_seqlens": cumulative([9, 0, 11]), "max_len": 16}
    got = run(compiled, tensors, backend="gpu", **options)
    assert_same_run(got, run(on_the_circle, tensors, backend="gpu", **options), 0.0)


def test_automatic_takes_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_why_no_gpu", lambda: "")
    assert dispatch.choose_name(CUMULATIVE_ANGLE, None, "cuda", torch.bfloat16) == "gpu"
    assert dispatch.choose_name(CUMULATIVE_ANGLE, None, "cuda", torch.float64) == "portable"
