"""The residual sum with its norm: every backend against the float64 reference; outputs, gradients, dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from plait.ops import add_norm as package
from plait.ops.add_norm import add_norm
from plait.ops.add_norm.cpu_kernels import ROWS
from plait.ops.gated_norm import gated_norm
from plait.ops.triton_support import INTERPRET
from tests.ops.helpers import assert_close, assert_same_run, rms_error, run, to_double

BACKENDS = [
    "portable",
    "cpu",
    pytest.param(
        "gpu", marks=pytest.mark.skipif(not INTERPRET.value, reason="not on this platform: see tests/gpu")
    ),
]
HALF = torch.bfloat16
TOLERANCE, NARROW = 1e-5, 4e-3


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(
    *shape: int, x: torch.dtype = torch.float32, y: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    """A stream and what is added to it, of different sizes in different rows."""
    g = torch.Generator().manual_seed(3)
    size = torch.logspace(-2, 1, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return {
        "x": (torch.randn(shape, generator=g, dtype=torch.float64) * size).to(x),
        "y": (torch.randn(shape, generator=g, dtype=torch.float64) * size.flip(0)).to(y),
        "weight": torch.randn(shape[-1:], generator=g),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 33), (1, 1), (6,), (2 * ROWS + 3, 16), (3, 2500)])
def test_against_the_reference(backend: str, shape: tuple[int, ...], weighted: bool, eps: float) -> None:
    given = make(*shape)
    if not weighted:
        given["weight"] = None
    got = run(add_norm, given, eps=eps, backend=backend)
    assert_same_run(got, run(add_norm, to_double(given), eps=eps, backend="reference"), TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_output_alone_has_its_gradient(backend: str) -> None:
    given = make(5, 20)
    for wanted in (0, 1):

        def one(**tensors: Tensor) -> Tensor:
            return add_norm(**tensors, backend=backend)[wanted]  # noqa: B023

        def truth(**tensors: Tensor) -> Tensor:
            return add_norm(**tensors, backend="reference")[wanted]  # noqa: B023

        assert_same_run(run(one, given), run(truth, to_double(given)), TOLERANCE)


@pytest.mark.parametrize("backend", ["portable", "cpu"])  # the interpreter's bfloat16 is not the GPU's
@pytest.mark.parametrize("kinds", [(torch.float32, HALF), (HALF, torch.float32), (HALF, HALF)])
def test_mixed_precision(kinds: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    """Under autocast the stream is float32, what is added and the norm bfloat16; the sum keeps the wider dtype."""
    given = make(70, 24, x=kinds[0], y=kinds[1])
    kind = torch.promote_types(*kinds)
    for made in (None, HALF):
        normed, total = add_norm(**given, dtype=made, backend=backend)
        assert (normed.dtype, total.dtype) == (made or kind, kind)
        got = run(add_norm, given, dtype=made, backend=backend)
        want = run(add_norm, to_double(given), backend="reference")
        assert_same_run(got, want, NARROW)
        for name in "xy":
            assert got.grads[name].dtype == given[name].dtype  # type: ignore[union-attr]
        if kind == torch.float32:
            assert_close(got.outputs[1], want.outputs[1], TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_of_the_sum_that_is_kept(backend: str) -> None:
    """Rounded to bfloat16 first: what is added and normed in two steps gives the same numbers."""
    given = make(9, 32, x=HALF, y=HALF)
    if backend == "gpu":
        given = make(9, 32)
    normed, total = add_norm(**given, backend=backend)
    assert torch.equal(total, given["x"] + given["y"])  # type: ignore[operator]
    assert rms_error(normed, gated_norm(total, None, given["weight"], backend="reference")) < 3e-4


@pytest.mark.parametrize("backend", ["portable", "cpu"])
def test_strides_and_threads(backend: str) -> None:
    wide = make(3, 40, 24)
    x, y, weight = (torch.as_tensor(wide[name]) for name in ("x", "y", "weight"))
    turned = y.transpose(0, 1).contiguous().transpose(0, 1)
    given = {"x": x[:, :37, 2:22], "y": turned[:, :37, 2:22], "weight": weight[2:22]}
    truth = run(add_norm, to_double(given), backend="reference")
    assert_same_run(run(add_norm, given, backend=backend), truth, TOLERANCE)
    large = make(1500, 64)
    one = run(add_norm, large, backend=backend)
    torch.set_num_threads(2)
    try:
        two = run(add_norm, large, backend=backend)
    finally:
        torch.set_num_threads(1)
    assert_same_run(one, two, 0.0)


def test_registered_ops() -> None:
    from plait.ops.add_norm import cpu

    x, y = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6, dtype=HALF, requires_grad=True)
    weight = torch.randn(6, requires_grad=True)
    torch.library.opcheck(cpu._forward, (x, y, weight, 1e-5, HALF))
    torch.library.opcheck(cpu._forward, (x, y.float(), None, 1e-5, torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    result = run(add_norm, make(1, 4) | {"x": torch.ones(0, 4), "y": torch.ones(0, 4)}, backend=backend)
    assert result.outputs[0].shape == (0, 4) and not result.grads["weight"].any()


def test_errors() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"add_norm: y has shape \(2, 4\), expected \(\.\.\., E\) = \(2, 3\)"
    ):
        add_norm(one, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"weight has shape \(2,\)"):
        add_norm(one, one, torch.ones(2))
    with pytest.raises(ValueError, match="E >= 1"):
        add_norm(torch.ones(2, 0), torch.ones(2, 0))
    assert set(package.ADD_NORM.targets) == {"gpu", "cpu", "portable", "reference"}
