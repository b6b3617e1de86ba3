"""On a GPU: the convolution, the gated norm and packed attention at real sizes, in three precisions, against float64.

Run with ``pytest -m gpu tests/gpu``; results of such runs are kept in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.add_norm import add_norm
from plait.ops.attention import attention
from plait.ops.causal_conv1d import causal_conv1d
from plait.ops.cumulative_angle import cumulative_angle
from plait.ops.gated_norm import gated_norm
from tests.ops.helpers import assert_close, cumulative, random_lengths

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# what rounding to the dtype alone costs, half as much again; sums are float32 in all of them
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
SUMS = 1e-5


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel does not write is seen."""
    new_empty, empty = Tensor.new_empty, torch.empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    yield


@contextmanager
def never_synchronising() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=g, device="cuda").to(dtype)


def everything(
    fn: Callable[..., Any], tensors: Mapping[str, Tensor | None], **options: Any
) -> dict[str, Tensor]:
    """Outputs and all gradients, of one random weighting of the outputs that does not depend on the precision."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    outputs = fn(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # in the memory order of the output, as a next layer's gradient is
    weights = [
        torch.empty_like(y).copy_(normal(*y.shape, dtype=torch.bfloat16, seed=9 + i))
        for i, y in enumerate(outputs)
    ]
    wanted = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(
        outputs, list(wanted.values()), weights, allow_unused=True, materialize_grads=True
    )
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(wanted, grads, strict=True))


def against_float64(fn: Callable[..., Any], tensors: dict[str, Tensor | None], **options: Any) -> None:
    """Right to the rounding of each result's own dtype, and the same bits twice."""
    got = everything(fn, tensors, backend="gpu", **options)
    again = everything(fn, tensors, backend="gpu", **options)
    assert all(torch.equal(got[k], again[k]) for k in got)
    del again
    wide = {k: None if t is None else t.double() for k, t in tensors.items()}
    want = everything(fn, wide, backend="portable", **options)
    for name, true in want.items():
        sums = name in ("weight", "bias")
        assert_close(got[name], true, SUMS if sums else ROUNDING[got[name].dtype], name)


def convolution(
    rows: int, length: int, channels: int, width: int, n_seq: int, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Inputs, x in the middle of a projection."""
    return {
        "x": normal(rows, length, channels + 64 + 16, dtype=dtype)[..., 64 : 64 + channels],
        "weight": normal(channels, width, seed=1),
        "bias": normal(channels, seed=2),
        "initial_state": normal(n_seq, width - 1, channels, seed=3, dtype=dtype),
    }


def packing(lengths: list[int]) -> dict[str, Any]:
    return {"cu_seqlens": cumulative(lengths).cuda(), "max_len": max(lengths)}


# Few forms of the kernels, each for many cases: compiling takes longer than running.
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_as_in_training(dtype: torch.dtype) -> None:
    for rows, length, channels in [(4, 2048, 4096), (1, 4096, 4352)]:
        tensors = convolution(rows, length, channels, 4, rows, dtype) | {"initial_state": None}
        against_float64(causal_conv1d, tensors, activation="silu")
    x = normal(2, 4352, 512, dtype=dtype).transpose(1, 2)  # tokens side by side
    against_float64(causal_conv1d, tensors | {"x": x}, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_of_packed_documents(dtype: torch.dtype) -> None:
    for seed, documents in enumerate((1, 7, 40)):
        tensors = convolution(1, 3000, 1536, 4, documents, dtype) | {"initial_state": None}
        against_float64(
            causal_conv1d, tensors, activation="silu", **packing(random_lengths(3000, documents, seed))
        )


def test_convolution_that_goes_on() -> None:
    """Documents with states, odd widths, several numbers of taps."""
    for width, channels in [(4, 200), (2, 37), (1, 33), (12, 64)]:
        tensors = convolution(1, 777, channels, width, 9, torch.bfloat16)
        against_float64(causal_conv1d, tensors, activation="silu", **packing(random_lengths(777, 9, width)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_as_in_training(dtype: torch.dtype) -> None:
    wide = normal(4096, 8208, dtype=dtype)
    gated = {"x": wide[:, 16:4112], "z": wide[:, 4112:], "weight": normal(4096, seed=1)}
    against_float64(gated_norm, gated)
    against_float64(gated_norm, gated, group_size=512, norm_before_gate=True)
    against_float64(gated_norm, {"x": wide[:, :2048], "z": None, "weight": normal(2048)})
    heads = normal(2, 300, 1000, dtype=dtype)[..., 100:868].unflatten(-1, (12, 64))
    against_float64(gated_norm, {"x": heads, "z": None, "weight": None})


@pytest.mark.parametrize("channels", [33, 5000, 12000, 40000])
def test_norm_of_other_widths(channels: int) -> None:
    x, z = (normal(50, channels, dtype=torch.bfloat16, seed=i) for i in range(2))
    against_float64(gated_norm, {"x": x, "z": z, "weight": normal(channels, seed=2)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_norm_as_in_training(dtype: torch.dtype) -> None:
    """A stream in float32 under autocast, or all in one dtype; the norm in the dtype of the products."""
    for channels in (768, 1024, 4096, 5000):
        x, y = (normal(3000, channels, seed=i) for i in range(2))
        weight = normal(channels, seed=2)
        against_float64(add_norm, {"x": x.to(dtype), "y": y.to(dtype), "weight": weight})
        against_float64(add_norm, {"x": x, "y": y.to(dtype), "weight": weight})
    normed, total = add_norm(x, y.to(dtype), weight, dtype=dtype, backend="gpu")
    assert (normed.dtype, total.dtype) == (dtype, torch.float32)
    assert_close(normed, add_norm(x.double(), y.to(dtype).double(), weight)[0], ROUNDING[dtype])
    against_float64(gated_norm, {"x": x, "z": None, "weight": weight})
    narrow = gated_norm(x, None, weight, dtype=dtype, backend="gpu")
    assert_close(narrow, gated_norm(x.double(), None, weight), ROUNDING[dtype])


def test_running_angle() -> None:
    """Long rows in chunks, and packed documents; compared on the circle."""

    def on_the_circle(**options: Any) -> tuple[Tensor, ...]:
        theta, final = cumulative_angle(**options)
        return theta.cos(), theta.sin(), final.cos(), final.sin()

    dense = {"step": normal(2, 5000, 8, 32), "initial_state": normal(2, 8, 32, seed=1).abs()}
    against_float64(on_the_circle, dense)
    lengths = random_lengths(5000, 30, 3)
    packed = {"step": normal(1, 5000, 8, 32), "initial_state": normal(30, 8, 32, seed=1).abs()}
    against_float64(on_the_circle, packed, **packing(lengths))


def test_convolution_beyond_2_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 48 << 30:
        pytest.skip("needs a GPU with 48 GB")
    length = 500_000
    tensors = convolution(1, length, 4352, 4, 1, torch.bfloat16)
    x, weight, bias = (tensors[k] for k in ("x", "weight", "bias"))
    x.requires_grad_()
    options = {"activation": "silu"}
    y, final = causal_conv1d(x, weight, bias, **options, backend="gpu")
    (dx,) = torch.autograd.grad(y, x, y.detach())
    first = length - 200
    tail, past = x.detach()[:, first:].requires_grad_(), x.detach()[:, first - 3 : first]
    want, state = causal_conv1d(tail, weight, bias, **options, initial_state=past, backend="portable")
    assert_close(y[:, first:], want, ROUNDING[torch.bfloat16], "y")
    assert torch.equal(final, state)
    (true,) = torch.autograd.grad(want, tail, y[:, first:].detach())
    assert_close(dx[:, first:], true, ROUNDING[torch.bfloat16], "x")
    assert not y.isnan().any() and not dx.isnan().any()


def test_norm_beyond_2_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 48 << 30:
        pytest.skip("needs a GPU with 48 GB")
    x = normal(550_000, 4096, dtype=torch.bfloat16)
    weight = normal(4096)
    got = everything(gated_norm, {"x": x, "z": x, "weight": weight}, backend="gpu")
    want = gated_norm(x[-99:], x[-99:], weight, backend="portable")
    assert_close(got["output 0"][-99:], want, ROUNDING[torch.bfloat16], "y")
    assert not any(t.isnan().any() for t in got.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 64), (True, 1), (False, None), (False, 50)]
)
@pytest.mark.parametrize(("heads", "kv", "width"), [(8, 8, 64), (8, 2, 128), (6, 3, 36)])
def test_packed_attention(
    heads: int, kv: int, width: int, causal: bool, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [5, 0, 1, 700, 64, 130, 0]
    wide = normal(1, sum(lengths), (heads + 2 * kv) * width, dtype=dtype).unflatten(-1, (-1, width))
    tensors = dict(zip("qkv", wide.split([heads, kv, kv], 2), strict=True))
    options = {"causal": causal, "window": window, "cu_seqlens": cumulative(lengths).cuda(), "max_len": 700}
    got = everything(attention, tensors, backend="gpu", **options)
    want = everything(attention, {k: t.double() for k, t in tensors.items()}, backend="portable", **options)
    for name, true in want.items():
        assert_close(got[name], true, 2.5 * ROUNDING[dtype], name)


def test_packed_attention_never_synchronises() -> None:
    q, k, v = (normal(1, 900, 4, 64, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(3))
    documents = packing([400, 0, 500])
    for step in range(2):  # the first sets things up
        with never_synchronising() if step else torch.enable_grad():
            attention(q, k, v, **documents).sum().backward()
    with torch.autocast("cuda", torch.bfloat16), never_synchronising():
        y = attention(q.float(), k, v.float(), **documents)
    assert y.dtype == torch.bfloat16


def test_one_graph() -> None:
    """Compiled without breaks, by the automatic choice, forward and backward, with the same bits."""
    documents = packing([100, 0, 1, 199])
    x = normal(1, 300, 512, dtype=torch.bfloat16)
    cases: list[tuple[Callable[..., Any], dict[str, Tensor | None], dict[str, Any]]] = [
        (causal_conv1d, {"x": x, "weight": normal(512, 4), "bias": normal(512)}, {"activation": "silu", **documents}),
        (gated_norm, {"x": x, "z": x, "weight": normal(512)}, {"group_size": 64}),
        (attention, dict.fromkeys("qkv", x.unflatten(-1, (8, 64))), documents),
    ]  # fmt: skip
    for fn, tensors, options in cases:
        torch._dynamo.reset()
        traced = everything(torch.compile(fn, fullgraph=True, backend="aot_eager"), tensors, **options)
        eager = everything(fn, tensors, **options)
        for name, true in eager.items():
            if fn is attention:  # its gradient of q is summed in any order
                assert_close(traced[name], true, 1e-3, name)
            else:
                assert torch.equal(traced[name], true)
