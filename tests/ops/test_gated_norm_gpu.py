"""The Triton kernels of the gated RMS norm, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops.gated_norm import gated_norm, gpu
from tests.ops.helpers import assert_close, run
from tests.ops.interpreter import Tensors, against_reference, needs_interpreter, normal, poisoned, without

__all__ = ["poisoned"]
pytestmark = [needs_interpreter, pytest.mark.usefixtures("poisoned")]


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was planned for a shape is forgotten before and after."""
    for step in range(2):
        gpu._forward_call.cache_clear()
        gpu._backward_call.cache_clear()
        if not step:
            yield


def make(*shape: int) -> Tensors:
    return {"x": normal(*shape), "z": normal(*shape, seed=1), "weight": normal(shape[-1], seed=2)}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("absent", [(), ("z",), ("z", "weight")], ids=["all", "no gate", "least"])
@pytest.mark.parametrize(
    ("shape", "size"), [((2, 5, 24), 8), ((7, 33), None), ((300, 12), 6), ((6,), 3), ((2, 5000), 2500)]
)
def test_any_shape(shape: tuple[int, ...], size: int | None, absent: tuple[str, ...], first: bool) -> None:
    against_reference(gated_norm, without(make(*shape), *absent), group_size=size, norm_before_gate=first)


def test_nothing_to_do() -> None:
    result = run(gated_norm, make(0, 4), backend="gpu")
    assert result.outputs[0].shape == (0, 4) and not result.grads["weight"].any()


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("first", [False, True])
def test_large_and_small_numbers(eps: float, first: bool) -> None:
    tensors = make(9, 40)
    tensors["z"] = tensors["z"] * torch.logspace(-3, 2, 9).unsqueeze(1)
    tensors["x"] = tensors["x"] * torch.logspace(2, -4, 9).unsqueeze(1)
    against_reference(gated_norm, tensors, eps=eps, norm_before_gate=first)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("ahead", [False, True])
def test_programs_with_several_tiles(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than programs, the last tile beyond the end; the parts of the weights' gradient add up."""
    monkeypatch.setattr(gpu, "TILE", 32)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 2)
    for table in (gpu.FORWARD, gpu.BACKWARD):
        monkeypatch.setitem(table, 32, gpu.Config(1, 2, ahead))
    for first in (False, True):
        against_reference(gated_norm, make(45, 12), group_size=6, norm_before_gate=first)


def heads(x: Tensor) -> Tensor:
    """(2, 3, 40) -> (2, 3, 6, 5): heads in the middle of a projection."""
    return x[..., 5:35].unflatten(-1, (6, 5))


VIEWS = {
    "slice": ((2, 3, 40), lambda x: x[..., 3:23]),
    "heads": ((2, 3, 40), heads),
    "one token of heads": ((2, 1, 40), heads),
    "transposed": ((2, 3, 40), lambda x: x.transpose(1, 2)),
    "broadcast": ((2, 1, 8), lambda x: x.expand(2, 5, 8)),
    "turned": ((2, 3, 4, 8), lambda x: x.permute(3, 0, 1, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str) -> None:
    """Read where it lies; a gradient in any order."""
    shape, view = VIEWS[name]

    def viewed(x: Tensor, z: Tensor, weight: Tensor, **options: Any) -> Tensor:
        y = gated_norm(view(x), view(z), weight, **options)
        turned = list(range(y.dim()))[::-1]
        y.register_hook(lambda g: g.permute(turned).contiguous().permute(turned))
        return y

    tensors = {"x": normal(*shape), "z": normal(*shape, seed=1)}
    tensors["weight"] = normal(view(tensors["x"]).shape[-1], seed=2)
    against_reference(viewed, tensors)


def test_rows_of() -> None:
    """What is read where it lies, and what has to be copied."""
    wide = normal(2, 3, 40)
    assert gpu.rows_of((2, 3, 40), (wide.stride(),)) == (1, [(40, 0)])
    assert gpu.rows_of((2, 3, 6, 5), (heads(wide).stride(),)) == (6, [(40, 5)])
    assert gpu.rows_of((2, 1, 6, 5), (heads(wide[:, :1]).stride(),)) == (6, [(120, 5)])
    assert gpu.rows_of((40,), ((1,), (1,))) == (1, [(0, 0), (0, 0)])
    assert gpu.rows_of((2, 40, 3), (wide.transpose(1, 2).stride(),)) is None
    turned = normal(2, 3, 4, 8).permute(2, 0, 1, 3)  # three strides
    assert gpu.rows_of((4, 2, 3, 8), (turned.stride(),)) == (6, [(8, 32)])
    assert gpu.rows_of((4, 2, 3, 8), (turned.stride(), (48, 24, 8, 1))) == (6, [(8, 32), (48, 8)])
    assert gpu.rows_of((4, 2, 3, 8), ((8, 999, 32, 1),)) is None


@pytest.mark.parametrize("kinds", [("float16", "float16"), ("float16", "float32"), ("float32", "float64")])
def test_mixed_precision(kinds: tuple[str, str]) -> None:
    tensors = make(5, 24)
    for name, kind in zip("xz", kinds, strict=True):
        tensors[name] = tensors[name].to(getattr(torch, kind))
    got = run(gated_norm, tensors, group_size=8, backend="gpu")
    want = run(gated_norm, {k: t.double() for k, t in tensors.items()}, group_size=8, backend="reference")
    for name, true in zip(["y", *got.grads], [*want.outputs, *want.grads.values()], strict=True):
        ours = got.outputs[0] if name == "y" else got.grads[name]
        assert ours.dtype == tensors["x" if name == "y" else name].dtype
        assert_close(ours, true, 5e-4 if "float16" in kinds else 1e-6, name)


def test_only_inputs_are_kept() -> None:
    tensors, kept = make(16, 24), []
    tensors["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gated_norm(**tensors, backend="gpu")
    assert sum(kept) == sum(t.numel() for t in tensors.values())


def test_opcheck() -> None:
    x, z, weight = (t.requires_grad_() for t in make(9, 12).values())
    op, back = gpu.NORM.forward, gpu.NORM.backward
    torch.library.opcheck(op, (x, z, weight, 1e-5, 4, True, torch.float32))
    torch.library.opcheck(op, (x, None, None, 1e-5, 12, False, torch.float16))
    x, z, weight = (t.detach() for t in (x, z, weight))
    torch.library.opcheck(back, (x, x, z, weight, 1e-5, 4, True))
    torch.library.opcheck(back, (x, x, None, None, 1e-5, 4, False))


def test_one_graph() -> None:
    torch._dynamo.reset()
    traced = run(torch.compile(gated_norm, fullgraph=True, backend="aot_eager"), make(9, 12), backend="gpu")
    eager = run(gated_norm, make(9, 12), backend="gpu")
    for a, b in zip(
        [*traced.outputs, *traced.grads.values()], [*eager.outputs, *eager.grads.values()], strict=True
    ):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendError, match=r"given torch\.float64"):
        gated_norm(normal(2, 2).double(), backend="gpu")


def test_a_dtype_of_its_own() -> None:
    """One shape in two dtypes: what is kept for the first is not used for the second."""
    for kind in (torch.float32, torch.float16, torch.float32):
        got = run(gated_norm, make(9, 12), dtype=kind, backend="gpu")
        assert got.outputs[0].dtype == kind
        want = run(
            gated_norm, {k: t.double() for k, t in make(9, 12).items() if t is not None}, backend="reference"
        )
        assert_close(got.outputs[0], want.outputs[0], 1e-6 if kind == torch.float32 else 1e-3)
        assert_close(got.grads["x"], want.grads["x"], 1e-6 if kind == torch.float32 else 1e-3)
