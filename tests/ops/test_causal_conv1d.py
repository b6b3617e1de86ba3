"""The causal convolution: portable against the tap-by-tap reference, packed, split, compiled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from plait.config.errors import PlaitError
from plait.ops.causal_conv1d import causal_conv1d
from tests.ops.helpers import (
    assert_close,
    assert_same_run,
    cumulative,
    padded_cumulative,
    random_lengths,
    run,
    separate_documents,
    to_double,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = [torch.float64, torch.float32]
LENGTHS = [3, 0, 1, 2, 9, 0, 5, 1, 0]


def make(
    rows: int,
    length: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    n_seq: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    return {
        "x": normal(rows, length, channels),
        "weight": normal(channels, width),
        "bias": normal(channels),
        "initial_state": normal(rows if n_seq is None else n_seq, width - 1, channels),
    }


def against_reference(tensors: dict[str, Tensor | None], **options: object) -> None:
    x = tensors["x"]
    assert x is not None
    got = run(causal_conv1d, tensors, backend="portable", **options)
    want = run(causal_conv1d, to_double(tensors), backend="reference", **options)
    assert_same_run(got, want, TOLERANCE[x.dtype])
    assert [y.dtype for y in got.outputs] == [x.dtype, x.dtype]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.sampled_from([1, 3, 16, 33]),
    width=st.integers(1, 6),
    activation=st.sampled_from([None, "silu"]),
    dtype=st.sampled_from(DTYPES),
    without=st.sets(st.sampled_from(["bias", "initial_state"])),
    seed=st.integers(0, 9),
)
def test_dense(
    rows: int,
    length: int,
    channels: int,
    width: int,
    activation: str | None,
    dtype: torch.dtype,
    without: set[str],
    seed: int,
) -> None:
    tensors = make(rows, length, channels, width, dtype, seed=seed)
    against_reference({k: None if k in without else t for k, t in tensors.items()}, activation=activation)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    documents=st.integers(1, 7),
    width=st.integers(1, 6),
    activation=st.sampled_from([None, "silu"]),
    dtype=st.sampled_from(DTYPES),
    without=st.sets(st.sampled_from(["bias", "initial_state"])),
    seed=st.integers(0, 9),
)
def test_packed(
    n: int,
    documents: int,
    width: int,
    activation: str | None,
    dtype: torch.dtype,
    without: set[str],
    seed: int,
) -> None:
    lengths = random_lengths(n, documents, seed)
    tensors = make(1, n, 5, width, dtype, documents, seed)
    against_reference(
        {k: None if k in without else t for k, t in tensors.items()},
        activation=activation,
        cu_seqlens=cumulative(lengths, torch.int64 if seed % 2 else torch.int32),
        max_len=max(lengths) + seed % 3,
    )


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_packed_is_separate_documents(width: int, backend: str) -> None:
    n, options = sum(LENGTHS), {"activation": "silu", "backend": backend}
    tensors = make(1, n, 5, width, torch.float64, len(LENGTHS))

    def separate(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> list[Tensor]:
        return separate_documents(
            lambda **t: causal_conv1d(weight=weight, bias=bias, **t, **options),
            {"x": x},
            {"initial_state": initial_state},
            LENGTHS,
        )

    packed = run(causal_conv1d, tensors, cu_seqlens=cumulative(LENGTHS), max_len=9, **options)
    assert_same_run(packed, run(separate, tensors), 1e-12)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_no_path_over_a_boundary(lengths: list[int] | None) -> None:
    """NaN in one sequence stays there, in outputs, states and the input's gradient."""
    n_seq, n = (3, 8) if lengths is None else (len(lengths), sum(LENGTHS))
    tensors = make(3 if lengths is None else 1, n, 4, 4, torch.float32, n_seq)
    x, bad = tensors["x"], torch.zeros(tensors["x"].shape[:2], dtype=torch.bool)
    if lengths is None:
        bad[1] = True
    else:
        bad[:, sum(lengths[:4]) : sum(lengths[:5])] = True
    x = x.masked_fill(bad.unsqueeze(2), float("nan")).requires_grad_()
    options = {} if lengths is None else {"cu_seqlens": cumulative(lengths), "max_len": 9}
    y, final = causal_conv1d(**tensors | {"x": x}, activation="silu", backend="portable", **options)
    assert torch.equal(y.isnan().any(2), bad)
    assert torch.equal(
        final.isnan().flatten(1).any(1).nonzero().view(-1), torch.tensor([1 if lengths is None else 4])
    )
    y.sum().backward()
    assert not x.grad[~bad].isnan().any()


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 10, 11, 12])
def test_any_split_is_the_whole(cut: int, width: int) -> None:
    tensors = make(2, 12, 5, width, torch.float64)
    options = {"activation": "silu", "backend": "portable"}

    def halves(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = causal_conv1d(x[:, :cut], weight, bias, initial_state=initial_state, **options)
        z, state = causal_conv1d(x[:, cut:], weight, bias, initial_state=state, **options)
        return torch.cat([y, z], 1), state

    assert_same_run(run(halves, tensors), run(causal_conv1d, tensors, **options), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_no_token_keeps_the_state(backend: str, dtype: torch.dtype) -> None:
    tensors = make(1, sum(LENGTHS), 3, 4, dtype, len(LENGTHS))
    options = {"cu_seqlens": cumulative(LENGTHS), "max_len": 9, "backend": backend}
    _, final = causal_conv1d(**tensors, **options)
    empty = [i for i, length in enumerate(LENGTHS) if length == 0]
    assert torch.equal(final[empty], tensors["initial_state"][empty])
    for rows, length in [(2, 0), (0, 5), (0, 0)]:
        tensors = make(rows, length, 3, 4, dtype)
        y, final = causal_conv1d(**tensors, backend=backend)
        assert y.shape == (rows, length, 3) and y.dtype == dtype
        assert torch.equal(final, tensors["initial_state"])
    tensors = make(1, 0, 3, 4, dtype, 2)
    _, final = causal_conv1d(**tensors, cu_seqlens=cumulative([0, 0]), max_len=1, backend=backend)
    assert torch.equal(final, tensors["initial_state"])
    y, final = causal_conv1d(
        tensors["x"], tensors["weight"], cu_seqlens=cumulative([]), max_len=0, backend=backend
    )
    assert y.shape == (1, 0, 3) and final.shape == (0, 3, 3)


def test_causal_bit_for_bit() -> None:
    tensors = make(1, 40, 32, 4, torch.float32)
    y, _ = causal_conv1d(**tensors, activation="silu", backend="portable")
    tensors["x"][:, 17] += 1
    z, _ = causal_conv1d(**tensors, activation="silu", backend="portable")
    assert torch.equal(y[:, :17], z[:, :17])
    assert not torch.equal(y[:, 20], z[:, 20])


@pytest.mark.parametrize("lengths", [None, [2, 0, 1, 3]])
def test_gradcheck(lengths: list[int] | None) -> None:
    tensors = make(2 if lengths is None else 1, 6, 2, 3, torch.float64, 2 if lengths is None else 4)
    options = {} if lengths is None else {"cu_seqlens": cumulative(lengths), "max_len": 3}
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b, h: causal_conv1d(
            x, w, b, initial_state=h, activation="silu", backend="portable", **options
        ),
        leaves,
    )


def test_any_strides() -> None:
    """A slice of a wide projection, and time innermost: the same numbers as a contiguous copy."""
    tensors = make(2, 9, 6, 4, torch.float32)
    want = run(causal_conv1d, tensors, activation="silu", backend="portable")
    wide = torch.randn(2, 9, 20)
    wide[..., 7:13] = tensors["x"]
    for x in (wide[..., 7:13], tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)):
        assert not x.is_contiguous()
        weight = tensors["weight"].t().contiguous().t()
        leaves = [x.requires_grad_(), weight.requires_grad_(), tensors["bias"].requires_grad_()]
        y, final = causal_conv1d(
            *leaves, initial_state=tensors["initial_state"], activation="silu", backend="portable"
        )
        assert_close(y, want.outputs[0], 1e-6)
        assert torch.equal(final, want.outputs[1])
    x = wide[..., 7:13].detach().requires_grad_()
    y, _ = causal_conv1d(x, weight, initial_state=tensors["initial_state"], backend="portable")
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    z, _ = causal_conv1d(
        x.double(), weight.double(), initial_state=tensors["initial_state"], backend="reference"
    )
    assert_close(grad, torch.autograd.grad(z.square().sum(), x)[0], 1e-5)


def test_long_row() -> None:
    """Longer than one block of the weight gradient's running sums."""
    tensors = make(1, 900, 40, 4, torch.float32, 5)
    against_reference(tensors, activation="silu", cu_seqlens=cumulative([400, 0, 1, 2, 497]), max_len=512)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_low_precision(backend: str) -> None:
    """bfloat16 in, bfloat16 out, computed in float32, whatever autocast says."""
    tensors = make(2, 30, 8, 4, torch.bfloat16)
    want, _ = causal_conv1d(**to_double(tensors), activation="silu", backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = causal_conv1d(**tensors, activation="silu", backend=backend)
    assert y.dtype == final.dtype == torch.bfloat16
    assert_close(y, want, 3e-3)
    tensors = make(2, 30, 8, 4, torch.float32)
    want = run(causal_conv1d, to_double(tensors), activation="silu", backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(causal_conv1d, tensors, activation="silu", backend=backend)
    assert_same_run(got, want, 1e-5)


def test_nothing_but_inputs_is_kept() -> None:
    tensors = make(1, 256, 16, 4, torch.float32)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        causal_conv1d(tensors["x"].requires_grad_(), tensors["weight"], activation="silu", backend="portable")
    assert sum(kept) < 1.1 * 256 * 16


def test_packings_share_a_graph() -> None:
    """Twenty packings: one graph, without breaks, and another one when max_len first changes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend=counter)
    counts = []
    for seed in range(20):
        cu_seqlens, max_len = padded_cumulative(random_lengths(40, 5 + seed % 4, seed))
        tensors = make(1, 40, 3, 4, torch.float32, 8, seed)
        options = {"activation": "silu", "cu_seqlens": cu_seqlens, "max_len": max_len, "backend": "portable"}
        assert_same_run(run(compiled, tensors, **options), run(causal_conv1d, tensors, **options), 1e-5)
        counts.append((max_len, counter.frame_count))
    assert len({max_len for max_len, _ in counts}) > 1
    assert counts[-1][1] == counts[5][1] <= 3


@pytest.mark.parametrize(
    ("backend", "rows", "lengths"),
    [("portable", 2, None), ("portable", 11, None), ("portable", 11, [5, 0, 6]), ("reference", 11, None)],
)
def test_compiled_gradients(backend: str, rows: int, lengths: list[int] | None) -> None:
    """Forward and backward as graphs of plain operations."""
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    tensors = make(1, rows, 3, 4, torch.float32, 1 if lengths is None else 3)
    options = {"activation": "silu", "backend": backend}
    if lengths is not None:
        options |= {"cu_seqlens": cumulative(lengths), "max_len": 8}
    assert_same_run(run(compiled, tensors, **options), run(causal_conv1d, tensors, **options), 1e-5)


def test_errors() -> None:
    tensors = make(2, 5, 4, 3, torch.float32)
    wrong = {
        "x": torch.zeros(5, 4),
        "weight": torch.zeros(5, 3),
        "bias": torch.zeros(3),
        "initial_state": torch.zeros(2, 3, 4),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"causal_conv1d: {name} has shape .* expected \("):
            causal_conv1d(**tensors | {name: value})
    with pytest.raises(ValueError, match="expected None or 'silu'"):
        causal_conv1d(**tensors, activation="gelu")
    with pytest.raises(ValueError, match="one row"):
        causal_conv1d(tensors["x"], tensors["weight"], cu_seqlens=cumulative([5, 5]), max_len=5)
    with pytest.raises(PlaitError, match="backend"):
        causal_conv1d(**tensors, backend="nonsense")
