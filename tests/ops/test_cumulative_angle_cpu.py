"""The Numba backend of the running angle: against the float64 reference, the turn, and as a torch custom op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.ops import dispatch
from plait.ops.cumulative_angle import CUMULATIVE_ANGLE, cpu, cumulative_angle
from tests.ops.helpers import assert_same_run, cumulative, random_lengths, run, to_double
from tests.ops.test_cumulative_angle import inputs, on_the_circle

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@few
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    """More angles than a task takes, too."""
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    length = data.draw(st.sampled_from([1, 2, 65, 140]), "length")
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {}
    if data.draw(st.booleans(), "packed"):
        options = {"cu_seqlens": cumulative(random_lengths(length, count, count)), "max_len": length}
    tensors = inputs(1 if options else count, length, count, torch.float32)
    if data.draw(st.booleans(), "many angles"):
        tensors["step"] = torch.randn(*tensors["step"].shape[:2], 3, 100)  # type: ignore[union-attr]
        tensors["initial_state"] = torch.rand(count, 3, 100) * 6
    if data.draw(st.booleans(), "from zero"):
        tensors["initial_state"] = None
    want = run(on_the_circle, to_double(tensors), backend="reference", **options)
    assert_same_run(run(on_the_circle, tensors, backend="cpu", **options), want, 1e-5)


def test_a_long_float32_row_keeps_its_angle() -> None:
    step = torch.rand(1, 20000, 1, 1) * math.pi
    theta, final = cumulative_angle(step, backend="cpu")
    exact = step.double().cumsum(1)
    assert (theta.cos() - exact.cos()).abs().max() < 2e-6
    assert torch.equal(final, theta[:, -1])


def test_stays_below_a_full_turn() -> None:
    """Float32 has no number between 2 pi - 2e-7 and its own 2 pi, which is above the real one."""
    for step in (-1e-9, -1e-7, -3e-7, 2 * math.pi, 2 * math.pi - 1e-6, 1e3, -1e3):
        for initial in (None, torch.full((1, 1, 1), -1e-9)):
            angles = cumulative_angle(torch.full((1, 40, 1, 1), step), initial_state=initial, backend="cpu")
            assert all(((angle >= 0) & (angle.double() < 2 * math.pi)).all() for angle in angles)


def test_an_empty_document_keeps_its_angle_and_nan_stays_in_its_own() -> None:
    tensors = inputs(1, 9, 4, torch.float32)
    step, initial = tensors["step"], tensors["initial_state"]
    assert step is not None and initial is not None
    step[0, 4] = float("nan")
    theta, final = cumulative_angle(
        step, initial_state=initial, cu_seqlens=cumulative([4, 0, 2, 3]), backend="cpu"
    )
    assert torch.equal(final[1], initial[1])
    assert theta[0, 4:6].isnan().all() and final[2].isnan().all()
    assert not theta[0, [0, 1, 2, 3, 6, 7, 8]].isnan().any() and not final[[0, 1, 3]].isnan().any()
    assert torch.equal(cumulative_angle(step[:, :0], backend="cpu")[1], torch.zeros(1, 2, 3))


def test_narrow_steps_give_float32_angles() -> None:
    step = torch.randn(2, 9, 2, 3).bfloat16()
    got = run(on_the_circle, {"step": step}, backend="cpu")
    want = run(on_the_circle, to_double({"step": step}), backend="reference")
    assert [t.dtype for t in got.outputs] == [torch.float32] * 4 and got.grads["step"].dtype == torch.bfloat16
    assert_same_run(got, want, 1e-5, 4e-3)


def test_is_a_correct_custom_op() -> None:
    step, initial = torch.randn(1, 9, 2, 3, requires_grad=True), torch.rand(2, 2, 3, requires_grad=True)
    torch.library.opcheck(cpu._forward, (step, initial, cumulative([4, 5])))
    torch.library.opcheck(cpu._forward, (step, None, None))
    torch.library.opcheck(cpu._backward, (step.detach(), initial.detach(), cumulative([4, 5])))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(packed: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(on_the_circle, fullgraph=True, backend="aot_eager")
    tensors = inputs(1 if packed else 3, 20, 3, torch.float32)
    options = {"cu_seqlens": cumulative([9, 0, 11]), "max_len": 16} if packed else {}
    got = run(compiled, tensors, backend="cpu", **options)
    assert_same_run(got, run(on_the_circle, tensors, backend="cpu", **options), 0.0)


def test_automatic_takes_it_but_not_for_float64() -> None:
    assert dispatch.choose_name(CUMULATIVE_ANGLE, None, "cpu", torch.float32) == "cpu"
    assert dispatch.choose_name(CUMULATIVE_ANGLE, None, "cpu", torch.float64) == "portable"
