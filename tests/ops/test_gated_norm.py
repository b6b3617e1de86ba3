"""The gated RMS norm: portable against the formula, in both orders, by groups, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from plait.config.errors import PlaitError
from plait.ops.gated_norm import gated_norm
from tests.ops.helpers import assert_close, assert_same_run, run, to_double

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ORDERS = [False, True]


def make(
    *shape: int,
    dtype: torch.dtype = torch.float64,
    without: set[str] | frozenset[str] = frozenset(),
    seed: int = 0,
) -> dict[str, Tensor | None]:
    # not the seed of the outputs' weighting: x along its own gradient gives a gradient of zero
    draw = torch.Generator().manual_seed(seed + 100)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype)

    tensors = {"x": normal(*shape), "z": normal(*shape), "weight": normal(shape[-1])}
    return {k: None if k in without else t for k, t in tensors.items()}


def against_reference(tensors: dict[str, Tensor | None], **options: Any) -> None:
    x = tensors["x"]
    assert x is not None
    got = run(gated_norm, tensors, backend="portable", **options)
    want = run(gated_norm, to_double(tensors), backend="reference", **options)
    assert_same_run(got, want, TOLERANCE[x.dtype])
    assert got.outputs[0].dtype == x.dtype


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(12,), (1, 24), (3, 5, 12), (2, 3, 1, 24)]),
    group_size=st.sampled_from([None, 12, 6, 3, 2]),
    norm_before_gate=st.booleans(),
    eps=st.sampled_from([1e-5, 0.5]),
    dtype=st.sampled_from(list(TOLERANCE)),
    without=st.sets(st.sampled_from(["z", "weight"])),
    seed=st.integers(0, 9),
)
def test_reference(
    shape: tuple[int, ...],
    group_size: int | None,
    norm_before_gate: bool,
    eps: float,
    dtype: torch.dtype,
    without: set[str],
    seed: int,
) -> None:
    tensors = make(*shape, dtype=dtype, without=without, seed=seed)
    against_reference(tensors, group_size=group_size, norm_before_gate=norm_before_gate, eps=eps)


@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_blocks_of_rows(dtype: torch.dtype, norm_before_gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one shorter; then rows longer than a block."""
    for elements in (60, 7):
        monkeypatch.setattr("plait.ops.gated_norm.portable.BLOCK_ELEMENTS", elements)
        against_reference(make(2, 13, 12, dtype=dtype), norm_before_gate=norm_before_gate, group_size=4)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_by_hand(backend: str) -> None:
    x, z, w = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -2.0]]), torch.tensor([2.0, 0.5])
    gate = z * z.sigmoid()
    after = gated_norm(x, z, w, eps=0.0, norm_before_gate=True, backend=backend)
    assert_close(after, x / 12.5**0.5 * w * gate, 1e-6)
    u = x * gate
    before = gated_norm(x, z, w, eps=0.0, backend=backend)
    assert_close(before, u / (u.square().sum() / 2) ** 0.5 * w, 1e-6)
    one_each = gated_norm(x, eps=0.0, group_size=1, backend=backend)
    assert_close(one_each, torch.ones(1, 2), 1e-6)


@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("without", [set(), {"z"}, {"weight"}])
def test_gradcheck(norm_before_gate: bool, without: set[str]) -> None:
    tensors = {k: t for k, t in make(2, 4, without=without).items() if t is not None}
    assert torch.autograd.gradcheck(
        lambda *leaves: gated_norm(
            **dict(zip(tensors, leaves, strict=True)),
            group_size=2,
            norm_before_gate=norm_before_gate,
            backend="portable",
        ),
        [t.requires_grad_() for t in tensors.values()],
    )


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_low_precision(norm_before_gate: bool, backend: str) -> None:
    """bfloat16 in, bfloat16 out; statistics in float32 even where bfloat16 sums are far off; autocast is ignored."""
    tensors = make(4, 2048, dtype=torch.bfloat16)
    options = {"norm_before_gate": norm_before_gate}
    want = run(gated_norm, to_double(tensors), backend="reference", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(gated_norm, tensors, backend=backend, **options)
    assert got.outputs[0].dtype == torch.bfloat16
    assert {t.dtype for t in got.grads.values()} == {torch.bfloat16}
    assert_same_run(got, want, 3e-3)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_large_and_small_numbers(backend: str) -> None:
    """Rows of any size have the same norm; zeros give zeros and finite gradients."""
    x = torch.randn(3, 64) * torch.tensor([[1e-2], [1e3], [0.0]])
    leaf = x.clone().requires_grad_()
    y = gated_norm(leaf, eps=1e-12, backend=backend)
    y.sum().backward()
    assert_close(y[:2].square().mean(1), torch.ones(2), 1e-5)
    assert torch.equal(y[2], torch.zeros(64)) and leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_nothing_to_do(backend: str) -> None:
    for shape in [(0, 6), (2, 0, 6)]:
        result = run(gated_norm, make(*shape), backend=backend)
        assert result.outputs[0].shape == shape
        assert torch.equal(result.grads["weight"], torch.zeros(6, dtype=torch.float64))


def test_any_strides() -> None:
    tensors = make(2, 7, 6)
    want = run(gated_norm, tensors, backend="portable")

    def sliced(wide: Tensor, weight: Tensor) -> Tensor:
        return gated_norm(wide[..., 1:7], wide[..., 7:13], weight, backend="portable")

    wide = torch.cat([torch.ones(2, 7, 1), tensors["x"], tensors["z"]], 2).double()
    for memory in (wide, wide.transpose(0, 1).contiguous().transpose(0, 1)):
        got = run(sliced, {"wide": memory, "weight": tensors["weight"]})
        assert_close(got.outputs[0], want.outputs[0], 1e-15)
        assert_close(got.grads["wide"][..., 1:], torch.cat([want.grads["x"], want.grads["z"]], 2), 1e-14)


def test_nothing_but_inputs_and_scales_is_kept() -> None:
    tensors = make(100, 32, dtype=torch.float32)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_norm(tensors["x"].requires_grad_(), tensors["z"], tensors["weight"], backend="portable")
    assert sum(kept) < 2.1 * 100 * 32


@pytest.mark.parametrize(
    ("norm_before_gate", "compiler"), [(False, "aot_eager"), (True, "aot_eager"), (True, "eager")]
)
def test_compile(norm_before_gate: bool, compiler: str) -> None:
    """One graph, without breaks, for any number of rows."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(gated_norm, fullgraph=True, backend=counter)
    for backend in ("portable", "reference"):
        for rows in (4, 5, 6, 7):
            tensors = make(rows, 12, dtype=torch.float32, seed=rows)
            options = {"norm_before_gate": norm_before_gate, "group_size": 4, "backend": backend}
            assert_same_run(run(compiled, tensors, **options), run(gated_norm, tensors, **options), 1e-5)
    assert counter.frame_count <= 4


def test_errors() -> None:
    tensors = make(3, 6)
    with pytest.raises(ValueError, match=r"gated_norm: z has shape \(3, 5\), expected \(..., E\) = \(3, 6\)"):
        gated_norm(tensors["x"], torch.zeros(3, 5))
    with pytest.raises(ValueError, match="gated_norm: weight has shape"):
        gated_norm(tensors["x"], weight=torch.zeros(5))
    for size in (0, 4, 12):
        with pytest.raises(ValueError, match="expected a divisor of the 6 channels"):
            gated_norm(tensors["x"], group_size=size)
    with pytest.raises(ValueError, match="E >= 1"):
        gated_norm(torch.zeros(3, 0))
    with pytest.raises(PlaitError, match="backend"):
        gated_norm(tensors["x"], backend="nonsense")


@pytest.mark.parametrize("backend", ["portable", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_of_its_own(dtype: torch.dtype, backend: str) -> None:
    """Rounded once, from the float32 numbers; the gradient comes in that dtype and leaves in the inputs' own."""
    tensors = make(70, 24, dtype=torch.float32)
    got = run(gated_norm, tensors, group_size=6, dtype=dtype, backend=backend)
    assert got.outputs[0].dtype == dtype
    assert torch.equal(got.outputs[0], gated_norm(**tensors, group_size=6, backend=backend).to(dtype))  # type: ignore[arg-type]
    want = run(gated_norm, to_double(tensors), group_size=6, backend="reference")
    assert_same_run(got, want, 1e-5 if dtype == torch.float32 else 4e-3)
    assert {grad.dtype for grad in got.grads.values()} == {torch.float32}
