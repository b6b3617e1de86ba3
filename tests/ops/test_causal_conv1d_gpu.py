"""The Triton kernels of the causal convolution, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from plait.config.errors import BackendError
from plait.ops.causal_conv1d import causal_conv1d, gpu
from tests.ops.helpers import assert_close, cumulative, run
from tests.ops.interpreter import (
    Tensors,
    against_reference,
    needs_interpreter,
    normal,
    poisoned,
    without,
)

__all__ = ["poisoned"]
pytestmark = [needs_interpreter, pytest.mark.usefixtures("poisoned")]

LENGTHS = [3, 0, 1, 2, 0, 13, 1, 0]
"""Documents that begin on, before and behind an edge of the tiles of 8 tokens, some short, some empty."""


def make(rows: int, length: int, channels: int, width: int, n_seq: int) -> Tensors:
    return {
        "x": normal(rows, length, channels),
        "weight": normal(channels, width, seed=1),
        "bias": normal(channels, seed=2),
        "initial_state": normal(n_seq, width - 1, channels, seed=3),
    }


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks as long as they may be; what was planned for a shape is forgotten before and after."""
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    for step in range(2):
        gpu._forward_call.cache_clear()
        gpu._backward_call.cache_clear()
        if not step:
            yield


@pytest.mark.parametrize("absent", [(), ("bias", "initial_state")], ids=["all", "least"])
def test_dense(absent: tuple[str, ...]) -> None:
    tensors = without(make(2, 11, 5, 4, 2), *absent)
    against_reference(causal_conv1d, tensors, activation=None if absent else "silu")


@pytest.mark.parametrize("absent", [(), ("initial_state",)], ids=["all", "no state"])
def test_packed(absent: tuple[str, ...]) -> None:
    n = sum(LENGTHS)
    options = {"cu_seqlens": cumulative(LENGTHS), "max_len": 13, "activation": "silu"}
    got = against_reference(causal_conv1d, without(make(1, n, 3, 4, len(LENGTHS)), *absent), **options)
    assert not absent or not got.outputs[1][1].any()


@pytest.mark.usefixtures("one_program")
def test_chunks_of_several_tiles() -> None:
    tensors = make(1, 76, 3, 3, 4)
    assert gpu.plan(tensors["x"].shape, 4, 3, gpu.FORWARD).chunks == 2
    assert gpu.plan(tensors["x"].shape, 4, 3, gpu.BACKWARD).chunks == 1
    packing = {"cu_seqlens": cumulative([4, 40, 0, 32], torch.int64), "max_len": 40}
    against_reference(causal_conv1d, tensors, activation="silu", **packing)


@pytest.mark.parametrize("width", [1, 2, 11])
def test_widths(width: int) -> None:
    """Without a state, with one, and with more than a tile."""
    against_reference(causal_conv1d, make(1, 13, 2, width, 1), activation="silu")


@pytest.mark.parametrize("channels", [30, 60, 300])
def test_several_channels_a_lane(channels: int) -> None:
    tensors = make(1, 3, channels, 2, 1)
    lanes = [gpu.plan(tensors["x"].shape, 4, 2, gpu.Config(size, 64)).channels // 32 for size in (8, 16)]
    assert lanes == {30: [1, 1], 60: [2, 2], 300: [2, 4]}[channels]
    against_reference(causal_conv1d, tensors, activation="silu")


def test_one_token() -> None:
    """Decoding: the state moves by one; so it does when it is given in another dtype."""
    tensors = make(2, 1, 5, 4, 2)
    tensors["initial_state"] = tensors["initial_state"].half()
    y, final = causal_conv1d(**tensors, activation="silu", backend="gpu")
    want, state = causal_conv1d(**tensors, activation="silu", backend="reference")
    assert_close(y, want, 1e-6)
    assert torch.equal(final, state)


def test_nothing_to_do() -> None:
    for rows, length, channels in [(2, 0, 3), (0, 5, 3), (2, 3, 0)]:
        tensors = make(rows, length, channels, 4, rows)
        result = run(causal_conv1d, tensors, backend="gpu")
        assert result.outputs[0].shape == (rows, length, channels)
        assert length or torch.equal(result.outputs[1], tensors["initial_state"])
        assert not result.grads["weight"].any()
    result = run(causal_conv1d, make(1, 0, 3, 4, 2), cu_seqlens=cumulative([0, 0]), max_len=0, backend="gpu")
    assert result.grads["initial_state"].abs().min() > 0 and not result.grads["bias"].any()
    _, final = causal_conv1d(
        normal(1, 0, 3), normal(3, 4), cu_seqlens=cumulative([]), max_len=0, backend="gpu"
    )
    assert final.shape == (0, 3, 3)


def test_no_path_over_a_boundary() -> None:
    n = sum(LENGTHS)
    tensors = make(1, n, 2, 4, len(LENGTHS))
    bad = torch.zeros(1, n, dtype=torch.bool)
    bad[:, sum(LENGTHS[:3]) : sum(LENGTHS[:4])] = True
    x = tensors["x"].masked_fill(bad.unsqueeze(2), float("nan")).requires_grad_()
    options = {"cu_seqlens": cumulative(LENGTHS), "max_len": 13, "activation": "silu", "backend": "gpu"}
    y, final = causal_conv1d(**tensors | {"x": x}, **options)
    assert torch.equal(y.isnan().any(2), bad)
    assert final.isnan().flatten(1).any(1).nonzero().tolist() == [[3]]
    y.sum().backward()
    assert not x.grad[~bad].isnan().any()


def test_strides() -> None:
    """A slice of a wide projection, odd memory, and gradients that are transposed or broadcast: the same bits."""
    tensors = make(2, 9, 6, 3, 2)
    wide = normal(2, 9, 40, seed=5)
    wide[..., 7:13] = tensors["x"]
    weight, turned = tensors["weight"].t().contiguous().t(), normal(6, 9, 2, seed=6).permute(2, 1, 0)
    results = []
    for x in (tensors["x"], wide[..., 7:13], tensors["x"].permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        x = x.detach().requires_grad_()
        y, final = causal_conv1d(**tensors | {"x": x, "weight": weight}, backend="gpu")
        grads = [
            torch.autograd.grad(y, x, dy, retain_graph=True)[0]
            for dy in (turned, y.new_ones(()).expand_as(y))
        ]
        results.append([y, final, *grads])
    want = causal_conv1d(**tensors, backend="reference")[0]
    assert_close(results[0][0], want, 1e-6)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_half_precision_is_rounded_once() -> None:
    tensors = {k: None if t is None else t.half() for k, t in make(1, 9, 3, 4, 1).items()}
    got = run(causal_conv1d, tensors, activation="silu", backend="gpu")
    want = run(
        causal_conv1d, {k: t.double() for k, t in tensors.items()}, activation="silu", backend="reference"
    )
    torch.testing.assert_close(got.outputs[0].double(), want.outputs[0], rtol=2**-11 + 1e-5, atol=1e-6)
    for name, true in want.grads.items():  # the gradient of y has been rounded, too
        assert got.grads[name].dtype == torch.float16
        assert_close(got.grads[name], true, 5e-4, name)


def test_only_inputs_are_kept() -> None:
    tensors, kept = make(1, 16, 8, 4, 1), []
    tensors["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        causal_conv1d(**tensors, activation="silu", backend="gpu")
    assert sum(kept) == sum(t.numel() for t in tensors.values())


def test_opcheck() -> None:
    x, weight, bias, state = (t.requires_grad_() for t in make(1, 9, 2, 3, 2).values())
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    op, back = gpu.CONVOLUTION.forward, gpu.CONVOLUTION.backward
    torch.library.opcheck(op, (x, weight, bias, state, bounds, True))
    torch.library.opcheck(op, (x.detach().transpose(0, 2), weight[:1], None, None, None, False))
    y, final = op(x, weight, bias, state, bounds, True)
    plain = [t.detach() for t in (y, final, x, weight, bias, state)]
    torch.library.opcheck(back, (*plain, bounds, True))
    torch.library.opcheck(back, (plain[0], None, *plain[2:4], None, None, None, True))


def test_one_graph() -> None:
    torch._dynamo.reset()
    tensors, options = make(1, 9, 2, 3, 2), {"cu_seqlens": cumulative([4, 5]), "max_len": 5, "backend": "gpu"}
    traced = run(torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager"), tensors, **options)
    eager = run(causal_conv1d, tensors, **options)
    for a, b in zip(
        [*traced.outputs, *traced.grads.values()], [*eager.outputs, *eager.grads.values()], strict=True
    ):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    tensors = {k: t.double() for k, t in make(1, 2, 2, 2, 1).items()}
    with pytest.raises(BackendError, match=r"given torch\.float64"):
        causal_conv1d(**tensors, backend="gpu")
