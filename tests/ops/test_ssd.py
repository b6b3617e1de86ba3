"""Mamba-2's op: recorded numbers of the original, the float64 reference, packing, splits, compile."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from plait.ops.ssd import portable, ssd
from tests.ops.helpers import (
    Run,
    assert_close,
    assert_same_run,
    cumulative,
    padded_cumulative,
    random_lengths,
    run,
    separate_documents,
    to_double,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mamba2_ssd"
CASES = json.loads((FIXTURES / "meta.json").read_text())["cases"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PER_TOKEN = ("x", "dt", "B", "C")
SHARED = ("A", "D", "dt_bias")
portable_ssd = partial(ssd, backend="portable")
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def inputs(
    rows: int,
    length: int,
    n_seq: int,
    *,
    heads: int = 4,
    width: int = 3,
    groups: int = 2,
    state: int = 5,
    decay: str = "mixed",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random operands; `decay` sets dt * A: weak -0.01 or so, strong -20 or so, mixed anything between."""
    torch.manual_seed(seed)
    dt = torch.rand(rows, length, heads) + 0.1
    strength = {
        "weak": torch.full((heads,), 0.01),
        "strong": torch.full((heads,), 20.0),
        "mixed": torch.logspace(-2, 1.3, heads),
    }
    tensors = {
        "x": torch.randn(rows, length, heads, width),
        "dt": dt + torch.rand_like(dt) ** 4 * (decay == "mixed"),
        "A": -strength[decay],
        "B": torch.randn(rows, length, groups, state),
        "C": torch.randn(rows, length, groups, state),
        "D": torch.randn(heads),
        "dt_bias": torch.rand(heads) / 10,
        "initial_state": torch.randn(n_seq, heads, width, state),
    }
    return {name: t.to(dtype) for name, t in tensors.items()}


def in_chunks(size: int) -> Any:
    """The portable form with chunks of `size` tokens, and the public function's defaults."""

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        defaults = {
            "D": None,
            "dt_bias": None,
            "dt_softplus": False,
            "dt_limit": (0.0, float("inf")),
            "initial_state": None,
            "cu_seqlens": None,
            "max_len": None,
        }
        return portable.ssd(x, dt, A, B, C, chunk_size=size, **{**defaults, **options})

    return call


def reference_run(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(ssd, to_double(tensors), backend="reference", **options)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_numbers_of_the_original(case: str, backend: str) -> None:
    meta, t = CASES[case], load_file(FIXTURES / f"{case}.safetensors")
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    leaves = {name: t[name].requires_grad_() for name in names if name in t}
    low, high = meta["dt_limit"]
    y, final = ssd(
        *(leaves[n] for n in ("x", "dt", "A", "B", "C")),
        leaves.get("D"),
        dt_bias=leaves.get("dt_bias"),
        dt_softplus=meta["dt_softplus"],
        dt_limit=(low, float("inf") if high is None else high),
        initial_state=leaves.get("initial_states"),
        backend=backend,
    )
    if "z" in leaves:
        y = y * torch.nn.functional.silu(leaves["z"])
    loss = (y * t["w_out"]).sum() + (final * t["w_state"]).sum()
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert {f"grad.{name}" for name in grads} == {name for name in t if name.startswith("grad.")}
    tolerance = 2e-5 if case == "odd_long" else 1e-5
    for got, want, allowed in [
        (y, t["out"], tolerance),
        (final, t["final_states"], tolerance),
        *((grads[name], t[f"grad.{name}"], 1e-4) for name in grads),
    ]:
        assert (got - want).abs().max() <= allowed * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@few
@given(data=st.data())
def test_equals_the_reference(dtype: torch.dtype, data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]), "groups")
    shape: dict[str, Any] = {
        "groups": groups,
        "heads": groups * data.draw(st.sampled_from([1, 2]), "heads a group"),
        "width": data.draw(st.sampled_from([1, 3, 4, 7]), "width"),
        "state": data.draw(st.sampled_from([1, 2, 5, 8]), "state"),
        "decay": data.draw(st.sampled_from(["weak", "strong", "mixed"]), "decay"),
        "seed": data.draw(st.integers(0, 99), "seed"),
    }
    size = data.draw(st.sampled_from([1, 4, 16, 64]), "chunk")
    packed = data.draw(st.booleans(), "packed")
    length = data.draw(st.sampled_from([1, 2, 15, 16, 17, 33, 66]), "length")
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {"dt_softplus": data.draw(st.booleans(), "softplus")}
    if packed:
        options["cu_seqlens"] = cumulative(random_lengths(length, count, shape["seed"]))
        options["max_len"] = data.draw(st.sampled_from([None, length, 2 * length]), "max_len")
    else:
        count = min(count, 3)
    tensors = inputs(1 if packed else count, length, count, dtype=dtype, **shape)
    if data.draw(st.booleans(), "D of every channel"):
        tensors["D"] = torch.randn(shape["heads"], shape["width"], dtype=dtype)
    if data.draw(st.booleans(), "without options"):
        tensors |= {"D": None, "dt_bias": None, "initial_state": None}
    want = reference_run(tensors, **options)
    assert_same_run(run(in_chunks(size), tensors, **options), want, TOLERANCE[dtype])


def test_the_gradient_of_a_long_float32_row_is_exact() -> None:
    """Weak steps after many strong ones: here a float32 sum of steps, or of paths that cancel, is too coarse."""
    tensors = inputs(1, 640, 1, heads=2, groups=1, dtype=torch.float32)
    strong = (torch.arange(640) % 64 < 40) | (torch.rand(640) < 0.05)
    tensors["dt"] = torch.where(strong, 20.0, 0.02)[None, :, None].repeat(1, 1, 2)
    tensors["A"] = -torch.ones(2)
    want = reference_run(tensors)
    assert_same_run(run(portable_ssd, tensors), want, 1e-5)
    tensors["x"] = torch.where(strong[None, :, None, None], 0.0, tensors["x"])  # type: ignore[arg-type]
    assert_same_run(run(portable_ssd, tensors), reference_run(tensors), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_packed_equals_separate_documents(backend: str) -> None:
    lengths = [5, 0, 1, 66, 0, 128, 3, 64]
    tensors = inputs(1, sum(lengths), len(lengths))

    def separate(initial_state: Tensor, **t: Tensor) -> list[Tensor]:
        shared = {name: t[name] for name in SHARED}
        tokens = {name: t[name] for name in PER_TOKEN}
        states = {"initial_state": initial_state}
        return separate_documents(
            lambda **document: ssd(**document, **shared, backend=backend), tokens, states, lengths
        )

    packed = run(ssd, tensors, cu_seqlens=cumulative(lengths), max_len=200, backend=backend)
    assert_same_run(packed, run(separate, tensors), 1e-12)


def test_nothing_of_one_document_reaches_another() -> None:
    lengths = [70, 1, 0, 66]
    tensors = inputs(1, sum(lengths), 4)
    for name in PER_TOKEN:
        tensors[name][:, 70:71] = float("nan")  # type: ignore[index]
    tensors["initial_state"][1] = float("nan")  # type: ignore[index]
    got = run(portable_ssd, tensors, cu_seqlens=cumulative(lengths), max_len=128)
    y, final = got.outputs
    assert y[0, 70].isnan().all() and final[1].isnan().all()
    y[0, 70], final[1] = 0, 0
    assert not y.isnan().any() and not final.isnan().any()
    for name in PER_TOKEN:
        grad = got.grads[name]
        grad[0, 70] = 0
        assert not grad.isnan().any()


@pytest.mark.parametrize("split", [1, 7, 8, 9, 19])
def test_chunked_equals_whole(split: int) -> None:
    """Three sequences split at different places, the second one with no token in its first part."""
    chunk, total, first = in_chunks(8), [30, 20, 25], [split, 0, split + 2]
    tensors = inputs(1, sum(total), 3)

    def part(t: dict[str, Tensor], begin: list[int], end: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        starts = [sum(total[:s]) for s in range(3)]
        index = torch.cat([torch.arange(o + a, o + b) for o, a, b in zip(starts, begin, end, strict=True)])
        tokens = {name: t[name][:, index] for name in PER_TOKEN}
        lengths = [b - a for a, b in zip(begin, end, strict=True)]
        shared = {name: t[name] for name in SHARED}
        y, state = chunk(**tokens, **shared, initial_state=state, cu_seqlens=cumulative(lengths), max_len=32)
        return y.new_zeros(1, sum(total), *y.shape[2:]).index_copy(1, index, y), state

    def both(initial_state: Tensor, **t: Tensor) -> tuple[Tensor, Tensor]:
        y, state = part(t, [0, 0, 0], first, initial_state)
        rest, state = part(t, first, total, state)
        return y + rest, state

    whole = run(chunk, tensors, cu_seqlens=cumulative(total), max_len=32)
    assert_same_run(run(both, tensors), whole, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_a_sequence_without_tokens_keeps_its_state_bit_for_bit(backend: str) -> None:
    tensors = inputs(1, 9, 4)
    state = tensors["initial_state"]
    assert state is not None
    state[0, 0, 0, :2] = torch.tensor([-0.0, float("inf")])
    _, final = ssd(**tensors, cu_seqlens=cumulative([0, 9, 0, 0]), max_len=16, backend=backend)
    for s in (0, 2, 3):
        assert torch.equal(final[s].view(torch.int64), state[s].view(torch.int64))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_no_tokens_and_no_sequences(backend: str) -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 5, 0, None),
        (1, 0, 3, cumulative([0, 0, 0])),
        (1, 0, 0, cumulative([])),
    ]:
        tensors = inputs(rows, length, n_seq)
        got = run(ssd, tensors, cu_seqlens=cu, max_len=None if cu is None else 0, backend=backend)
        assert got.outputs[0].shape == (rows, length, 4, 3)
        assert torch.equal(got.outputs[1], tensors["initial_state"])  # type: ignore[arg-type]


def test_nothing_looks_ahead() -> None:
    tensors = inputs(1, 40, 1)
    before, _ = in_chunks(16)(**tensors)
    for name in PER_TOKEN:
        tensors[name][:, 21] += 1  # type: ignore[index]
    after, _ = in_chunks(16)(**tensors)
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21:], after[:, 21:])


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool) -> None:
    tensors = inputs(1, 7, 3 if packed else 1, heads=2, width=2, groups=1, state=2)
    cu = cumulative([4, 0, 3]) if packed else None
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, values, strict=True))
        return in_chunks(4)(**named, dt_softplus=True, cu_seqlens=cu, max_len=7)

    assert torch.autograd.gradcheck(call, leaves)


def test_any_strides_and_narrow_types() -> None:
    """Operands cut from one wide projection in bfloat16; states stay float32, autocast or not."""
    torch.manual_seed(0)
    wide = torch.randn(2, 20, 4 * 3 + 2 * 2 * 5 + 4).bfloat16()
    x, b, c, dt = wide.split([12, 10, 10, 4], -1)
    tensors: dict[str, Tensor | None] = {
        "x": x.unflatten(-1, (4, 3)),
        "dt": dt,
        "A": -torch.rand(4),
        "B": b.unflatten(-1, (2, 5)),
        "C": c.unflatten(-1, (2, 5)),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
        "initial_state": torch.randn(2, 4, 3, 5),
    }
    want = ssd(**to_double(tensors), dt_softplus=True, backend="reference")  # type: ignore[arg-type]
    y, final = portable_ssd(**tensors, dt_softplus=True)  # type: ignore[arg-type]
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert_close(y, want[0], 4e-3)
    assert_close(final, want[1], 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        again, under_autocast = portable_ssd(**tensors, dt_softplus=True)  # type: ignore[arg-type]
    assert torch.equal(under_autocast, final) and torch.equal(again, y)
    got = run(portable_ssd, {k: t if t is None else t.float() for k, t in tensors.items()}, dt_softplus=True)
    assert_same_run(got, reference_run(tensors, dt_softplus=True), 1e-5)


def test_saves_its_inputs_and_a_state_a_chunk() -> None:
    tensors = inputs(1, 1024, 1, heads=2, groups=1, width=8, state=8, dtype=torch.float32)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        portable_ssd(**leaves, dt_softplus=True)
    states = 1024 // portable.CHUNK_ROWS * 2 * 8 * 8
    given_elements = sum(t.numel() for t in leaves.values())
    assert sum(saved.values()) <= given_elements + 1.5 * states + 12 * 1024 * 2


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_compiles_once_for_many_packings(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ssd, fullgraph=True, backend=counter)
    n, counts = (100, []) if backend == "portable" else (9, [])
    for i in range(20):
        cu, max_len = padded_cumulative(random_lengths(n, random.Random(i).randint(5, 8), i))
        tensors = inputs(1, n, 8, heads=2, groups=1, dtype=torch.float32, seed=i)
        y, final = compiled(**tensors, cu_seqlens=cu, max_len=max_len, dt_softplus=True, backend=backend)
        want = portable_ssd(**tensors, cu_seqlens=cu, max_len=max_len, dt_softplus=True)  # type: ignore[arg-type]
        assert_close(y, want[0], 1e-5)
        assert_close(final, want[1], 1e-5)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[6] <= 4


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_gradients(packed: bool) -> None:
    torch._dynamo.reset()
    tensors = inputs(1 if packed else 2, 21, 4 if packed else 2, dtype=torch.float32)
    options = {"cu_seqlens": cumulative([9, 0, 1, 11]), "max_len": 16} if packed else {}
    compiled = torch.compile(in_chunks(8), fullgraph=True, backend="aot_eager")
    assert_same_run(run(compiled, tensors, **options), run(portable_ssd, tensors, **options), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.ones(2, 5, 3)}, r"ssd: dt has shape \(2, 5, 3\), expected \(S, T, H\) = \(2, 5, 4\)"),
        ({"x": torch.ones(2, 5, 12)}, r"ssd: x has shape \(2, 5, 12\), expected \(S, T, H, P\)"),
        ({"B": torch.ones(2, 5, 3, 5)}, "ssd: 3 groups do not divide 4 heads"),
        ({"initial_state": torch.ones(1, 4, 3, 5)}, r"expected \(S, H, P, N\) = \(2, 4, 3, 5\)"),
        ({"cu_seqlens": cumulative([5, 5])}, "with cu_seqlens the input has one row"),
        ({"cu_seqlens": torch.zeros(3)}, "expected .* of int32 or int64"),
        ({"dt_limit": (0.5, 0.1)}, "expected 0 <= low <= high"),
        ({"D": torch.ones(3)}, r"ssd: D has shape \(3,\), expected \(H\) = \(4,\)"),
    ],
)
def test_says_which_shape_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**{**inputs(2, 5, 2), **change})
