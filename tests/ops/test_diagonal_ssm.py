"""The time-invariant diagonal state-space model: portable against the recurrence, real and complex."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from plait.config.errors import PlaitError
from plait.ops.diagonal_ssm import diagonal_ssm
from plait.ops.diagonal_ssm.portable import CHUNK
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
DTYPES = list(TOLERANCE)
BACKENDS = ["portable", "reference"]
KINDS = [False, True]
LENGTHS = [CHUNK + 1, 0, 1, 2 * CHUNK, 5, 0, CHUNK - 1, 1, 0]


def make(
    rows: int,
    length: int,
    *,
    complex: bool,
    channels: int = 4,
    states: int = 3,
    dtype: torch.dtype = torch.float64,
    n_seq: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Inputs with memories of one to a thousand steps; complex ones turn by up to half a circle a step."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    pair = (2,) if complex else ()
    log_decay = -(1e-3 ** torch.rand(channels, states, generator=draw, dtype=torch.float64)) * 3
    if complex:
        angle = math.pi * (2 * torch.rand(channels, states, generator=draw, dtype=torch.float64) - 1)
        log_decay = torch.stack([log_decay, angle], -1)
    tensors = {
        "x": normal(rows, length, channels),
        "dA": log_decay,
        "B": normal(channels, states, *pair),
        "C": normal(channels, states, *pair),
        "D": normal(channels),
        "initial_state": normal(rows if n_seq is None else n_seq, channels, states, *pair),
    }
    return {k: t.to(dtype) for k, t in tensors.items()}


def call(x: Tensor, dA: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, **options: Any) -> Any:
    """diagonal_ssm with complex weights given as pairs of real numbers, which tests can compare and cast."""
    if dA.dim() == 3:
        dA, B, C = (torch.complex(*t.unbind(-1)) for t in (dA, B, C))
    return diagonal_ssm(x, dA, B, C, D, **options)


def against_reference(tensors: dict[str, Tensor | None], **options: Any) -> None:
    x = tensors["x"]
    assert x is not None
    got = run(call, tensors, backend="portable", **options)
    want = run(call, to_double(tensors), backend="reference", **options)
    assert_same_run(got, want, TOLERANCE[x.dtype])
    assert [t.dtype for t in got.outputs] == [x.dtype, x.dtype]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3),
    length=st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]),
    complex=st.booleans(),
    shape=st.sampled_from([(4, 3), (1, 1), (7, 2)]),
    dtype=st.sampled_from(DTYPES),
    without=st.sets(st.sampled_from(["D", "initial_state"])),
    seed=st.integers(0, 9),
)
def test_dense(
    rows: int,
    length: int,
    complex: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    without: set[str],
    seed: int,
) -> None:
    tensors = make(rows, length, complex=complex, channels=shape[0], states=shape[1], dtype=dtype, seed=seed)
    against_reference({k: None if k in without else t for k, t in tensors.items()})


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 120),
    documents=st.integers(1, 7),
    complex=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    without=st.sets(st.sampled_from(["D", "initial_state"])),
    seed=st.integers(0, 9),
)
def test_packed(
    n: int, documents: int, complex: bool, dtype: torch.dtype, without: set[str], seed: int
) -> None:
    lengths = random_lengths(n, documents, seed)
    tensors = make(1, n, complex=complex, dtype=dtype, n_seq=documents, seed=seed)
    against_reference(
        {k: None if k in without else t for k, t in tensors.items()},
        cu_seqlens=cumulative(lengths, torch.int64 if seed % 2 else torch.int32),
        max_len=max(lengths) + seed % 5 if seed else None,
    )


@pytest.mark.parametrize("complex", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_separate_documents(backend: str, complex: bool) -> None:
    tensors = make(1, sum(LENGTHS), complex=complex, n_seq=len(LENGTHS))

    def separate(x: Tensor, initial_state: Tensor, **weights: Tensor) -> list[Tensor]:
        return separate_documents(
            lambda **t: call(**t, **weights, backend=backend),
            {"x": x},
            {"initial_state": initial_state},
            LENGTHS,
        )

    packed = run(call, tensors, cu_seqlens=cumulative(LENGTHS), max_len=2 * CHUNK, backend=backend)
    assert_same_run(packed, run(separate, tensors), 1e-12)


@pytest.mark.parametrize("complex", KINDS)
def test_no_path_over_a_boundary(complex: bool) -> None:
    """NaN in one document stays there, in outputs, states and the input's gradient."""
    tensors = make(1, sum(LENGTHS), complex=complex, dtype=torch.float32, n_seq=len(LENGTHS))
    bad = torch.zeros(1, sum(LENGTHS), dtype=torch.bool)
    bad[:, sum(LENGTHS[:3]) : sum(LENGTHS[:4])] = True
    x = tensors["x"].masked_fill(bad.unsqueeze(2), float("nan")).requires_grad_()
    tensors["x"] = x
    y, final = call(**tensors, cu_seqlens=cumulative(LENGTHS), max_len=64, backend="portable")
    assert torch.equal(y.isnan().any(2), bad)
    assert final.isnan().flatten(1).any(1).nonzero().view(-1).tolist() == [3]
    (y.sum() + final.sum()).backward()
    assert not x.grad[~bad].isnan().any()


@pytest.mark.parametrize("complex", KINDS)
@pytest.mark.parametrize("cut", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_any_split_is_the_whole(cut: int, complex: bool) -> None:
    tensors = make(2, 2 * CHUNK + 5, complex=complex)

    def halves(x: Tensor, initial_state: Tensor, **weights: Tensor) -> tuple[Tensor, Tensor]:
        y, state = call(x[:, :cut], initial_state=initial_state, **weights, backend="portable")
        z, state = call(x[:, cut:], initial_state=state, **weights, backend="portable")
        return torch.cat([y, z], 1), state

    assert_same_run(run(halves, tensors), run(call, tensors, backend="portable"), 1e-12)


@pytest.mark.parametrize("complex", KINDS)
def test_step_by_step(complex: bool) -> None:
    tensors = make(2, 6, complex=complex)
    y, final = call(**tensors, backend="reference")
    x, state = tensors.pop("x"), tensors.pop("initial_state")
    for t in range(6):
        y_t, state = call(x[:, t : t + 1], initial_state=state, **tensors, backend="portable")
        assert_close(y_t, y[:, t : t + 1], 1e-12)
    assert_close(state, final, 1e-12)


@pytest.mark.parametrize("complex", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_keeps_the_state(backend: str, complex: bool) -> None:
    tensors = make(1, sum(LENGTHS), complex=complex, dtype=torch.float32, n_seq=len(LENGTHS))
    tensors["initial_state"][LENGTHS.index(0)].view(-1)[0] = -0.0
    _, final = call(**tensors, cu_seqlens=cumulative(LENGTHS), max_len=64, backend=backend)
    empty = [i for i, length in enumerate(LENGTHS) if length == 0]
    same = final[empty].contiguous().view(torch.int32) == tensors["initial_state"][empty].view(torch.int32)
    assert same.all()
    for rows, length in [(2, 0), (0, 5), (0, 0)]:
        tensors = make(rows, length, complex=complex, dtype=torch.bfloat16)
        tensors |= {k: tensors[k].float() for k in ("dA", "B", "C")}
        y, final = call(**tensors, backend=backend)
        assert y.shape == (rows, length, 4) and y.dtype == torch.bfloat16
        assert torch.equal(final, tensors["initial_state"].float()) and final.dtype == torch.float32
    tensors = make(1, 0, complex=complex, n_seq=2)
    for lengths in ([0, 0], []):
        tensors["initial_state"] = tensors["initial_state"][: len(lengths)]
        _, final = call(**tensors, cu_seqlens=cumulative(lengths), max_len=0, backend=backend)
        assert torch.equal(final, tensors["initial_state"])


def test_pairs_are_conjugates() -> None:
    """One complex state a channel is two real ones: a damped rotation."""
    x = torch.randn(1, 50, 1, dtype=torch.float64)
    decay, turn = -0.05, 0.7
    tensor = torch.tensor([[complex(decay, turn)]], dtype=torch.complex128)
    one = torch.ones_like(tensor)
    h, want = torch.zeros(2, dtype=torch.float64), []
    rotation = torch.tensor(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64
    ) * math.exp(decay)
    for value in x.view(-1):
        h = rotation @ h + torch.stack([value, torch.zeros_like(value)])
        want.append(2 * h[0])
    for backend in BACKENDS:
        y, final = diagonal_ssm(x, tensor, one, one, backend=backend)
        assert_close(y.view(-1), torch.stack(want), 1e-12)
        assert_close(final.view(-1), h, 1e-12)


def test_causal() -> None:
    """A change at t changes nothing in the chunks before, bit for bit, and nothing before t beyond rounding."""
    tensors = make(1, 3 * CHUNK, complex=True, dtype=torch.float32)
    y, _ = call(**tensors, backend="portable")
    tensors["x"][:, CHUNK + 4] += 1
    z, _ = call(**tensors, backend="portable")
    assert torch.equal(y[:, : CHUNK + 4], z[:, : CHUNK + 4])
    assert not torch.equal(y[:, CHUNK + 4], z[:, CHUNK + 4])


@pytest.mark.parametrize("complex", KINDS)
@pytest.mark.parametrize("lengths", [None, [3, 0, 2]])
def test_gradcheck(lengths: list[int] | None, complex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.ops.diagonal_ssm.portable.CHUNK", 2)
    tensors = make(1, 5, complex=complex, channels=2, states=2, n_seq=1 if lengths is None else 3)
    options = {} if lengths is None else {"cu_seqlens": cumulative(lengths), "max_len": 3}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: call(**dict(zip(names, leaves, strict=True)), backend="portable", **options),
        [t.requires_grad_() for t in tensors.values()],
    )


def test_complex_leaves() -> None:
    """Gradients of complex parameters are those of their parts."""
    tensors = make(2, CHUNK + 3, complex=True)
    parts = run(call, tensors, backend="portable")
    leaves = {k: torch.view_as_complex(tensors[k]).clone().requires_grad_() for k in ("dA", "B", "C")}
    rest = {k: tensors[k] for k in ("x", "D", "initial_state")}
    result = run(lambda **t: diagonal_ssm(**t, **leaves, backend="portable"), rest)
    assert_close(result.outputs[0], parts.outputs[0], 1e-15)
    draw = torch.Generator().manual_seed(0)
    y, final = diagonal_ssm(**rest, **leaves, backend="portable")
    loss = sum((t * torch.randn(t.shape, generator=draw, dtype=torch.float64)).sum() for t in (y, final))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(torch.view_as_real(grad), parts.grads[name], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend: str) -> None:
    """bfloat16 in: y bfloat16, the state float32, computed in float32, whatever autocast says."""
    tensors = make(2, 70, complex=True, dtype=torch.float32)
    expected = run(call, to_double(tensors), backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(call, tensors, backend=backend)
    assert_same_run(got, expected, 1e-5)
    tensors["x"] = tensors["x"].bfloat16()
    want, state = call(**to_double(tensors), backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = call(**tensors, backend=backend)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert_close(y, want, 3e-3)
    assert_close(final, state, 1e-5)


def test_long_angles_keep_their_digits() -> None:
    """Slow decay, fast turning: the powers of a chunk in float32 alone would be off by 1e-5."""
    tensors = make(1, 20 * CHUNK, complex=True, dtype=torch.float32)
    tensors["dA"][..., 0] = -1e-4
    tensors["dA"][..., 1] += 30
    want = run(call, to_double(tensors), backend="reference")
    assert_same_run(run(call, tensors, backend="portable"), want, 2e-6)


def test_packings_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty packings: one graph, without breaks, and another one when max_len first changes."""
    monkeypatch.setattr("plait.ops.diagonal_ssm.portable.CHUNK", 8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for seed in range(20):
        cu_seqlens, max_len = padded_cumulative(random_lengths(40, 5 + seed % 4, seed))
        tensors = make(1, 40, complex=True, dtype=torch.float32, n_seq=8, seed=seed)
        options = {"cu_seqlens": cu_seqlens, "max_len": max_len, "backend": "portable"}
        assert_same_run(run(compiled, tensors, **options), run(call, tensors, **options), 1e-5)
        counts.append((max_len, counter.frame_count))
    assert len({max_len for max_len, _ in counts}) > 1
    assert counts[-1][1] == counts[5][1] <= 3


@pytest.mark.parametrize(
    ("backend", "complex", "lengths"),
    [
        ("portable", True, None),
        ("portable", True, [9, 0, 8]),
        ("portable", False, [9, 0, 8]),
        ("reference", True, None),
    ],
)
def test_compiled_gradients(
    backend: str, complex: bool, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward as graphs of plain operations."""
    monkeypatch.setattr("plait.ops.diagonal_ssm.portable.CHUNK", 8)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = make(1, 17, complex=complex, dtype=torch.float32, n_seq=1 if lengths is None else 3)
    options = {"backend": backend}
    if lengths is not None:
        options |= {"cu_seqlens": cumulative(lengths), "max_len": 16}
    assert_same_run(run(compiled, tensors, **options), run(call, tensors, **options), 1e-5)


def test_errors() -> None:
    tensors = make(2, 5, complex=False)
    wrong = {
        "x": torch.zeros(5, 4),
        "dA": torch.zeros(5, 3),
        "B": torch.zeros(4, 2),
        "C": torch.zeros(3, 3),
        "D": torch.zeros(3),
        "initial_state": torch.zeros(1, 4, 3),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"diagonal_ssm: {name} has shape .* expected \("):
            diagonal_ssm(**tensors | {name: value})
    with pytest.raises(ValueError, match="both real or both complex"):
        diagonal_ssm(**tensors | {"B": torch.zeros(4, 3, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="expected a real one"):
        diagonal_ssm(**tensors | {"x": torch.zeros(2, 5, 4, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="one row"):
        diagonal_ssm(**tensors, cu_seqlens=cumulative([5, 5]), max_len=5)
    with pytest.raises(PlaitError, match="backend"):
        diagonal_ssm(**tensors, backend="nonsense")
