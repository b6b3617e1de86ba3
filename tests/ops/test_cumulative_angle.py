"""The running angle: reference, packing, splits, long rows, the turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from plait.ops.cumulative_angle import cumulative_angle
from tests.ops.helpers import (
    assert_same_run,
    cumulative,
    padded_cumulative,
    random_lengths,
    run,
    separate_documents,
    to_double,
)

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def inputs(
    rows: int, length: int, n_seq: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    return {
        "step": torch.randn(rows, length, 2, 3, dtype=dtype),
        "initial_state": torch.rand(n_seq, 2, 3, dtype=dtype) * 6,
    }


def on_the_circle(**arguments: Any) -> tuple[Tensor, ...]:
    """Angles as points: near a full turn two equal angles may be 2 pi apart."""
    theta, final = cumulative_angle(**arguments)
    return theta.cos(), theta.sin(), final.cos(), final.sin()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@few
@given(data=st.data())
def test_equals_the_reference(dtype: torch.dtype, tolerance: float, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    length = data.draw(st.sampled_from([1, 2, 63, 64, 65, 140]), "length")
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {}
    packed = data.draw(st.booleans(), "packed")
    if packed:
        options = {"cu_seqlens": cumulative(random_lengths(length, count, count)), "max_len": length}
    tensors = inputs(1 if packed else count, length, count, dtype)
    if data.draw(st.booleans(), "from zero"):
        tensors["initial_state"] = None
    want = run(on_the_circle, to_double(tensors), backend="reference", **options)
    assert_same_run(run(on_the_circle, tensors, backend="portable", **options), want, tolerance)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_packed_equals_separate_documents(backend: str) -> None:
    lengths = [5, 0, 1, 66, 0, 128]
    tensors = inputs(1, sum(lengths), len(lengths))

    def separate(step: Tensor, initial_state: Tensor) -> list[Tensor]:
        return separate_documents(
            lambda **d: cumulative_angle(**d, backend=backend),
            {"step": step},
            {"initial_state": initial_state},
            lengths,
        )

    options = {"cu_seqlens": cumulative(lengths), "max_len": 128, "backend": backend}
    assert_same_run(run(cumulative_angle, tensors, **options), run(separate, tensors), 1e-12)


@pytest.mark.parametrize("split", [1, 63, 64, 65])
def test_chunked_equals_whole(split: int) -> None:
    tensors = inputs(2, 130, 2)

    def both(step: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        first, state = cumulative_angle(step[:, :split], initial_state=initial_state)
        second, state = cumulative_angle(step[:, split:], initial_state=state)
        return torch.cat([first, second], 1), state

    assert_same_run(run(both, tensors), run(cumulative_angle, tensors), 1e-12)


def test_the_gradient_is_that_of_the_plain_sum() -> None:
    step = torch.randn(1, 70, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 70, 2, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad((cumulative_angle(step)[0] * weight).sum(), step)
    (want,) = torch.autograd.grad((step.cumsum(1) * weight).sum(), step)
    assert torch.allclose(got, want, rtol=1e-12)


def test_a_long_float32_row_keeps_its_angle() -> None:
    """20000 steps of up to pi: a plain float32 sum has lost the angle's third digit by then."""
    step = torch.rand(1, 20000, 1, 1) * math.pi
    theta, final = cumulative_angle(step)
    exact = step.double().cumsum(1)
    assert (theta.cos() - exact.cos()).abs().max() < 2e-6
    assert torch.equal(final, theta[:, -1])


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_stays_below_a_full_turn(backend: str) -> None:
    """Float32 has no number between 2 pi - 2e-7 and its own 2 pi, which is above the real one."""
    for step in (-1e-9, -1e-7, -3e-7, 2 * math.pi, 2 * math.pi - 1e-6):
        for initial in (None, torch.full((1, 1, 1), -1e-9)):
            angles = cumulative_angle(torch.full((1, 2, 1, 1), step), initial_state=initial, backend=backend)
            assert all(((angle >= 0) & (angle.double() < 2 * math.pi)).all() for angle in angles)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_no_tokens_and_no_sequences(backend: str) -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 3, 0, None),
        (1, 0, 2, cumulative([0, 0])),
        (1, 4, 3, cumulative([0, 4, 0])),
    ]:
        tensors = inputs(rows, length, n_seq)
        max_len = None if cu is None else length
        theta, final = cumulative_angle(**tensors, cu_seqlens=cu, max_len=max_len, backend=backend)
        assert theta.shape == (rows, length, 2, 3)
        kept = [0, 2] if n_seq == 3 else list(range(n_seq))
        assert torch.equal(final[kept], tensors["initial_state"][kept])  # type: ignore[index]


def test_narrow_steps_give_float32_angles() -> None:
    step = torch.randn(2, 9, 2, 3).bfloat16()
    theta, final = cumulative_angle(step)
    want, _ = cumulative_angle(step.float(), backend="reference")
    assert theta.dtype == final.dtype == torch.float32
    assert (theta.cos() - want.cos()).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_compiles_once_for_many_packings(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(on_the_circle, fullgraph=True, backend=counter)
    n, counts = 130 if backend == "portable" else 9, []
    for i in range(20):
        cu, max_len = padded_cumulative(random_lengths(n, 5 + i % 4, i))
        tensors = inputs(1, n, 8)
        options = {"cu_seqlens": cu, "max_len": max_len, "backend": backend}
        assert_same_run(run(compiled, tensors, **options), run(on_the_circle, tensors, **options), 1e-12)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[6] <= 4


def test_says_which_shape_is_wrong() -> None:
    with pytest.raises(
        ValueError, match=r"initial_state has shape \(2, 3\), expected \(S, H, Ra\) = \(1, 2, 3\)"
    ):
        cumulative_angle(torch.ones(1, 4, 2, 3), initial_state=torch.ones(2, 3))
