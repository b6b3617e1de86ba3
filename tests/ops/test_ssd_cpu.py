"""The Numba backend of Mamba-2's op: against the float64 reference, and as a torch custom op."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops import dispatch
from plait.ops.ssd import SSD, cpu, ssd
from tests.ops.helpers import (
    Run,
    assert_close,
    assert_same_run,
    cumulative,
    random_lengths,
    rms_error,
    run,
    to_double,
)
from tests.ops.test_ssd import PER_TOKEN, inputs, reference_run

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def on_cpu(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(ssd, tensors, backend="cpu", **options)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decays(tensors: dict[str, Tensor | None], low: float, high: float) -> dict[str, Tensor | None]:
    """The inputs with dt * A log-uniform in -[low, high], dt at most 1."""
    dt, A = tensors["dt"], tensors["A"]
    assert dt is not None and A is not None
    strength = low * (high / low) ** torch.rand_like(dt)
    return tensors | {"A": torch.full_like(A, -high), "dt": strength / high}


@few
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]), "groups")
    shape: dict[str, Any] = {
        "groups": groups,
        "heads": groups * data.draw(st.sampled_from([1, 2, 3]), "heads a group"),
        "width": data.draw(st.sampled_from([1, 3, 16, 21]), "width"),
        "state": data.draw(st.sampled_from([1, 5, 16, 33, 64, 70]), "state"),
        "decay": data.draw(st.sampled_from(["weak", "strong", "mixed"]), "decay"),
        "seed": data.draw(st.integers(0, 99), "seed"),
    }
    packed = data.draw(st.booleans(), "packed")
    length = data.draw(st.sampled_from([1, 2, 63, 64, 65, 129, 200]), "length")
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {"dt_softplus": data.draw(st.booleans(), "softplus")}
    if packed:
        options["cu_seqlens"] = cumulative(random_lengths(length, count, shape["seed"]))
        options["max_len"] = length
    else:
        count = min(count, 3)
    if data.draw(st.booleans(), "limits"):
        options["dt_limit"] = (0.3, 0.9)
    tensors = inputs(1 if packed else count, length, count, dtype=torch.float32, **shape)
    if data.draw(st.booleans(), "D of every channel"):
        tensors["D"] = torch.randn(shape["heads"], shape["width"])
    if data.draw(st.booleans(), "without options"):
        tensors |= {"D": None, "dt_bias": None, "initial_state": None}
    assert_same_run(on_cpu(tensors, **options), reference_run(tensors, **options), 1e-5)


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e-3), (1e-4, 20.0), (19.0, 20.0), (80.0, 120.0)])
def test_decays_of_any_strength(low: float, high: float) -> None:
    """The gradient of a decay of e^-20 is as exact, in proportion, as that of one near 1."""
    tensors = decays(inputs(1, 150, 3, width=8, state=16, dtype=torch.float32), low, high)
    options: dict[str, Any] = {"cu_seqlens": cumulative([80, 1, 69])}
    # exp(-90) has few digits left in float32
    tolerance = 1e-5 if high <= 20 else 1e-3
    assert_same_run(on_cpu(tensors, **options), reference_run(tensors, **options), tolerance)


def test_the_gradient_of_a_long_float32_row_is_exact() -> None:
    tensors = inputs(1, 640, 1, heads=2, groups=1, decay="mixed", dtype=torch.float32)
    tensors["dt"] = torch.where(torch.rand(1, 640, 2) < 0.1, 20.0, 0.02)
    tensors["A"] = -torch.ones(2)
    assert_same_run(on_cpu(tensors), reference_run(tensors), 1e-5)


def test_bfloat16_is_as_exact_as_portable() -> None:
    wide = torch.randn(2, 70, 4 * 20 + 2 * 2 * 17 + 4).bfloat16()
    x, b, c, dt = wide.split([80, 34, 34, 4], -1)
    tensors: dict[str, Tensor | None] = inputs(2, 70, 2, width=20, state=17, dtype=torch.float32)
    tensors |= {"x": x.unflatten(-1, (4, 20)), "dt": dt}
    tensors |= {"B": b.unflatten(-1, (2, 17)), "C": c.unflatten(-1, (2, 17))}
    want = reference_run(tensors, dt_softplus=True)
    got, portable = on_cpu(tensors, dt_softplus=True), run(ssd, tensors, dt_softplus=True, backend="portable")
    assert [t.dtype for t in got.outputs] == [torch.bfloat16, torch.float32]
    for a, b_, exact in zip(got.outputs, portable.outputs, want.outputs, strict=True):
        assert rms_error(a, exact) <= 1.1 * rms_error(b_, exact) + 1e-6
    for name, exact in want.grads.items():
        given_tensor = tensors[name]
        assert given_tensor is not None and got.grads[name].dtype == given_tensor.dtype
        assert rms_error(got.grads[name], exact) <= 1.1 * rms_error(portable.grads[name], exact) + 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_run(on_cpu(tensors, dt_softplus=True), got, 0.0)


@pytest.mark.parametrize("change", ["float16", "float32 B and C", "float64 state", "last stride"])
def test_other_types_and_strides(change: str) -> None:
    tensors = inputs(2, 20, 2, dtype=torch.float32)
    x = tensors["x"]
    assert x is not None
    if change == "float64 state":
        tensors["initial_state"] = tensors["initial_state"].double()  # type: ignore[union-attr]
    elif change == "last stride":
        tensors["x"] = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        tensors["x"] = x.to(torch.float16 if change == "float16" else torch.bfloat16)
    got = on_cpu(tensors)
    assert_same_run(got, reference_run(tensors), 1e-5 if x.dtype == tensors["x"].dtype else 4e-3)
    for name, grad in got.grads.items():
        assert grad.dtype == tensors[name].dtype  # type: ignore[union-attr]


def test_bfloat16_rounds_as_torch_does() -> None:
    """A row whose output is D x alone: every bfloat16 times a float32, rounded once."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    # a number that is not finite reaches its whole document, through a weight of 0 too
    x = torch.cat([x[x.isfinite()].view(-1, 16), x[~x.isfinite()][:, None].expand(-1, 16)])
    bounds = cumulative([int(x[:, 0].isfinite().sum()), *[1] * int((~x[:, 0].isfinite()).sum())])
    zeros = torch.zeros(1, len(x), 1, 1, dtype=torch.bfloat16)
    y, _ = ssd(
        x.view(1, -1, 1, 16),
        zeros[..., 0].float(),
        -torch.ones(1),
        zeros,
        zeros,
        torch.tensor([1.00390625]),
        cu_seqlens=bounds,
        backend="cpu",
    )
    want, y = (x.float() * 1.00390625).bfloat16(), y.view(-1, 16)
    finite = x.isfinite()
    assert torch.equal(y[finite].view(torch.int16) & 0x7FFF, want[finite].view(torch.int16) & 0x7FFF)
    assert not y[~finite].isfinite().any()


def test_no_tokens_and_no_sequences() -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 5, 0, None),
        (1, 0, 3, cumulative([0, 0, 0])),
        (1, 0, 0, cumulative([])),
    ]:
        tensors = inputs(rows, length, n_seq, dtype=torch.float32)
        got = on_cpu(tensors, cu_seqlens=cu, max_len=None if cu is None else 0)
        assert got.outputs[0].shape == (rows, length, 4, 3)
        assert torch.equal(got.outputs[1], tensors["initial_state"])  # type: ignore[arg-type]
        want = run(ssd, to_double(tensors), cu_seqlens=cu, backend="reference")
        assert_same_run(got, want, 1e-6)


def test_a_sequence_without_tokens_keeps_its_state_bit_for_bit() -> None:
    tensors = inputs(1, 9, 4, dtype=torch.float32)
    state = tensors["initial_state"]
    assert state is not None
    state[0, 0, 0, :2] = torch.tensor([-0.0, float("inf")])
    _, final = ssd(**tensors, cu_seqlens=cumulative([0, 9, 0, 0]), backend="cpu")  # type: ignore[arg-type]
    for s in (0, 2, 3):
        assert torch.equal(final[s].view(torch.int32), state[s].view(torch.int32))


def test_nothing_of_one_document_reaches_another() -> None:
    lengths = [70, 1, 0, 66]
    tensors = inputs(1, sum(lengths), 4, dtype=torch.float32)
    for name in PER_TOKEN:
        tensors[name][:, 70:71] = float("nan")  # type: ignore[index]
    tensors["initial_state"][1] = float("nan")  # type: ignore[index]
    got = on_cpu(tensors, cu_seqlens=cumulative(lengths), max_len=128)
    y, final = got.outputs
    assert y[0, 70].isnan().all() and final[1].isnan().all()
    y[0, 70], final[1] = 0, 0
    assert not y.isnan().any() and not final.isnan().any()
    for name in PER_TOKEN:
        got.grads[name][0, 70] = 0
        assert not got.grads[name].isnan().any()


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory that holds NaN when it is given out."""
    tensors = inputs(1, 150, 5, width=5, state=19, dtype=torch.float32)
    options: dict[str, Any] = {"cu_seqlens": cumulative([66, 0, 1, 70, 13]), "dt_softplus": True}
    want = on_cpu(tensors, **options)
    empty, new_empty, empty_like = cpu.np.empty, Tensor.new_empty, torch.empty_like
    poisoned = []

    def poison(t: Any) -> Any:
        poisoned.append(t)
        t[...] = float("nan")
        return t

    monkeypatch.setattr(cpu.np, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    got = on_cpu(tensors, **options)
    assert len(poisoned) >= 10
    assert_same_run(got, want, 0.0)


@pytest.mark.parametrize("lengths", [[4096], [900, 3, 0, 1500, 1200, 493]])
def test_the_number_of_threads_changes_no_bit(lengths: list[int], threads: None) -> None:
    tensors = inputs(1, 4096, len(lengths), width=16, state=16, dtype=torch.float32)
    options: dict[str, Any] = {"cu_seqlens": cumulative(lengths), "dt_softplus": True}
    runs = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        runs.append(on_cpu(tensors, **options))
    for other in runs[1:]:
        assert_same_run(other, runs[0], 0.0)


def test_is_a_correct_custom_op() -> None:
    tensors = inputs(1, 70, 2, heads=4, groups=2, dtype=torch.float32)
    x, dt, A, B, C, D, _, initial = (t for t in tensors.values() if t is not None)
    operands = (x[0], B[0].unsqueeze(1), C[0].unsqueeze(1), (dt * A)[0], dt[0])
    full = [
        t.detach().requires_grad_() for t in (*operands, torch.rand(70, 4), D, torch.rand(4, 1, 3), initial)
    ]
    rest = (cumulative([66, 4]), 2)
    torch.library.opcheck(cpu._forward, (*full, *rest, True))
    torch.library.opcheck(cpu._forward, (*full[:5], None, None, None, None, None, 1, True))
    detached = [t.detach() for t in full]
    marks = cpu._forward(*detached, *rest, True)[2]
    torch.library.opcheck(cpu._backward, (torch.ones(70, 1, 4, 3), None, *detached, *rest, marks))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(packed: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        lengths = [9 + seed, 0, 1, 70 - seed]
        tensors = inputs(1 if packed else 2, 80, 4 if packed else 2, dtype=torch.float32, seed=seed)
        options = {"cu_seqlens": cumulative(lengths), "max_len": 128} if packed else {}
        got = run(compiled, tensors, dt_softplus=True, backend="cpu", **options)
        assert_same_run(got, on_cpu(tensors, dt_softplus=True, **options), 0.0)


def test_saves_nothing_when_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(1, 200, 1, dtype=torch.float32)
    marks = []
    compute = cpu._compute

    def watch(*args: Any) -> Any:
        out = compute(*args)
        marks.append(out[2])
        given_all[:] = args
        return out

    given_all: list[Any] = []
    monkeypatch.setattr(cpu, "_forward", watch)
    monkeypatch.setattr(cpu, "_compute", watch)
    ssd(**tensors, backend="cpu")  # type: ignore[arg-type]
    with torch.no_grad():
        ssd(**{k: t.clone().requires_grad_() for k, t in tensors.items() if t is not None}, backend="cpu")  # type: ignore[arg-type]
    assert [m.numel() for m in marks] == [0, 0]
    with pytest.raises(RuntimeError, match="told not to keep"):
        cpu._backward(torch.ones(200, 1, 4, 3), None, *given_all[:-1], marks[0])
    ssd(**{k: t.clone().requires_grad_() for k, t in tensors.items() if t is not None}, backend="cpu")  # type: ignore[arg-type]
    assert marks[2].numel() > 0


def test_automatic_takes_it_and_float64_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dispatch.choose_name(SSD, None, "cpu", torch.float32) == "cpu"
    assert dispatch.choose_name(SSD, None, "cpu", torch.bfloat16) == "cpu"
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="plait.ops"):
        assert dispatch.choose_name(SSD, None, "cpu", torch.float64) == "portable"
    assert "'cpu' cannot run (it takes torch.float32" in caplog.text
    with pytest.raises(BackendError, match=r"it takes torch.float32, .* given torch.float64"):
        ssd(**inputs(1, 3, 1), backend="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("cu", [[0, 5, 9], [1, 5, 10], [0, 7, 5, 10]])
def test_refuses_documents_that_do_not_tile_the_row(cu: list[int]) -> None:
    tensors = inputs(1, 10, len(cu) - 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="must begin with 0, never fall and end with 10"):
        ssd(**tensors, cu_seqlens=torch.tensor(cu), backend="cpu")  # type: ignore[arg-type]


def test_one_step_of_decoding_equals_the_reference() -> None:
    tensors = inputs(3, 1, 3, width=64, state=128, dtype=torch.float32)
    y, final = ssd(**tensors, backend="cpu")  # type: ignore[arg-type]
    want = ssd(**to_double(tensors), backend="reference")  # type: ignore[arg-type]
    assert_close(y, want[0], 1e-5)
    assert_close(final, want[1], 1e-5)
