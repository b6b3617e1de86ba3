"""The Numba backend of Mamba-3's op: against the float64 reference, packing, threads, and as a torch custom op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops import dispatch
from plait.ops.ssd import TRAPEZOIDAL_SSD, cpu
from tests.ops.helpers import Run, assert_same_run, cumulative, random_lengths, rms_error, run, to_double
from tests.ops.test_trapezoidal_ssd import PER_TOKEN, STATES, inputs, op, reference_run

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def on_cpu(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(op, tensors, backend="cpu", **options)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@few
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    """Ranks that fill 16 rows, that leave some empty, and more than fit; lengths about slabs and blocks."""
    rank = data.draw(st.sampled_from([1, 2, 3, 4, 16, 17]), "rank")
    slab = max(16 // rank, 1)
    shape: dict[str, Any] = {
        "rank": rank,
        "heads": data.draw(st.sampled_from([1, 3]), "heads"),
        "width": data.draw(st.sampled_from([1, 7, 16, 21]), "width"),
        "state": data.draw(st.sampled_from([2, 5, 16, 33, 64]), "state"),
        "decay": data.draw(st.sampled_from(["weak", "strong", "mixed"]), "decay"),
        "seed": data.draw(st.integers(0, 99), "seed"),
    }
    length = data.draw(
        st.sampled_from([1, 2, slab, slab + 1, 4 * slab, 4 * slab + 1, 9 * slab + 2]), "length"
    )
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {}
    packed = data.draw(st.booleans(), "packed")
    if packed:
        options["cu_seqlens"] = cumulative(random_lengths(length, count, shape["seed"]))
        options["max_len"] = length
    else:
        count = min(count, 3)
    tensors = inputs(1 if packed else count, length, count, dtype=torch.float32, **shape)
    absent = data.draw(st.sets(st.sampled_from(["rank_in", "D", "states"])), "left out")
    for name in absent:
        tensors |= dict.fromkeys(STATES if name == "states" else [name])
    assert_same_run(on_cpu(tensors, **options), reference_run(tensors, **options), 1e-5)


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e-3), (1e-4, 20.0), (19.0, 20.0), (80.0, 120.0)])
@pytest.mark.parametrize("rank", [1, 3])
def test_decays_of_any_strength(rank: int, low: float, high: float) -> None:
    """The gradient of a decay of e^-20 is as exact, in proportion, as that of one near 1."""
    tensors = inputs(1, 150, 3, rank=rank, width=8, state=16, dtype=torch.float32)
    a = tensors["log_decay"]
    assert a is not None
    tensors["log_decay"] = -low * (high / low) ** torch.rand_like(a)
    options: dict[str, Any] = {"cu_seqlens": cumulative([80, 1, 69])}
    # e^-90 has few digits left in float32
    assert_same_run(
        on_cpu(tensors, **options), reference_run(tensors, **options), 1e-5 if high <= 20 else 1e-3
    )


def test_a_long_memory_keeps_its_digits() -> None:
    """Decays so weak that 4000 tokens are remembered: what float32 rounds in one decay would count 4000 times."""
    tensors = inputs(1, 4000, 1, heads=1, width=4, state=4, rank=1, dtype=torch.float32)
    tensors["log_decay"] = torch.full((1, 4000, 1), -1e-4)
    assert_same_run(on_cpu(tensors), reference_run(tensors), 3e-6)


@pytest.mark.parametrize("keys", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 2])
def test_bfloat16_is_as_exact_as_portable(rank: int, keys: torch.dtype) -> None:
    """A Mamba-3 layer rotates its keys in float32, whatever the dtype of its values."""
    tensors = inputs(2, 70, 2, rank=rank, width=20, state=17, dtype=torch.float32)
    for name, dtype in (("v", torch.bfloat16), ("k", keys), ("q", keys)):
        tensors[name] = tensors[name].to(dtype)  # type: ignore[union-attr]
    want, got, portable = reference_run(tensors), on_cpu(tensors), run(op, tensors, backend="portable")
    assert got.outputs[0].dtype == torch.bfloat16
    for a, b, exact in zip(got.outputs, portable.outputs, want.outputs, strict=True):
        assert a.dtype == b.dtype and rms_error(a, exact) <= 1.1 * rms_error(b, exact) + 1e-6
    for name, exact in want.grads.items():
        assert got.grads[name].dtype == tensors[name].dtype  # type: ignore[union-attr]
        assert rms_error(got.grads[name], exact) <= 1.1 * rms_error(portable.grads[name], exact) + 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = op(**tensors, backend="cpu")
    assert torch.equal(o, got.outputs[0])


@pytest.mark.parametrize("lengths", [[2000], [500, 3, 0, 700, 600, 197]])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_number_of_threads_changes_no_bit(rank: int, lengths: list[int], threads: None) -> None:
    tensors = inputs(1, 2000, len(lengths), rank=rank, heads=4, width=16, state=16, dtype=torch.float32)
    runs = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        runs.append(on_cpu(tensors, cu_seqlens=cumulative(lengths)))
    for other in runs[1:]:
        assert_same_run(other, runs[0], 0.0)


@pytest.mark.parametrize("rank", [1, 3])
def test_nothing_of_one_document_reaches_another(rank: int) -> None:
    lengths = [70, 1, 0, 66]
    tensors = inputs(1, sum(lengths), 4, rank=rank, dtype=torch.float32)
    for name in PER_TOKEN:
        tensors[name][:, 70:71] = float("nan")  # type: ignore[index]
    for name in STATES:
        tensors[name][1] = float("nan")  # type: ignore[index]
    got = on_cpu(tensors, cu_seqlens=cumulative(lengths), max_len=128)
    o, *finals = got.outputs
    assert o[0, 70].isnan().all()
    o[0, 70] = 0
    assert not o.isnan().any()
    for final in finals:
        assert final[1].isnan().all() and not final[[0, 2, 3]].isnan().any()
    for name in PER_TOKEN:
        got.grads[name][0, 70] = 0
        assert not got.grads[name].isnan().any()


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory that holds NaN when it is given out."""
    tensors = inputs(1, 150, 5, rank=3, width=5, state=19, dtype=torch.float32)
    options: dict[str, Any] = {"cu_seqlens": cumulative([66, 0, 1, 70, 13])}
    want = on_cpu(tensors, **options)
    empty, new_empty = cpu.np.empty, Tensor.new_empty
    poisoned = []

    def poison(t: Any) -> Any:
        poisoned.append(t)
        t[...] = float("nan")
        return t

    monkeypatch.setattr(cpu.np, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    got = on_cpu(tensors, **options)
    assert len(poisoned) >= 10
    assert_same_run(got, want, 0.0)


def test_no_tokens_and_no_sequences() -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 5, 0, None),
        (1, 0, 3, cumulative([0, 0, 0])),
        (1, 9, 4, cumulative([0, 9, 0, 0])),
    ]:
        tensors = inputs(rows, length, n_seq, dtype=torch.float32)
        tensors["ssm"].view(-1)[:1] = -0.0  # type: ignore[union-attr]
        tensors["last_v"].view(-1)[:1] = float("inf")  # type: ignore[union-attr]
        got = on_cpu(tensors, cu_seqlens=cu, max_len=None if cu is None else length)
        assert got.outputs[0].shape == (rows, length, 2, 3, 3)
        kept = [0, 2, 3] if n_seq == 4 else list(range(n_seq))
        for final, name in zip(got.outputs[1:], STATES, strict=True):
            before = tensors[name]
            assert before is not None
            assert torch.equal(final[kept].view(torch.int32), before[kept].view(torch.int32))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(packed: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        lengths = [9 + seed, 0, 1, 70 - seed]
        tensors = inputs(1 if packed else 2, 80, 4 if packed else 2, dtype=torch.float32, seed=seed)
        options = {"cu_seqlens": cumulative(lengths), "max_len": 128} if packed else {}
        assert_same_run(run(compiled, tensors, backend="cpu", **options), on_cpu(tensors, **options), 0.0)


def test_automatic_takes_it_but_not_for_float64() -> None:
    assert dispatch.choose_name(TRAPEZOIDAL_SSD, None, "cpu", torch.float32) == "cpu"
    assert dispatch.choose_name(TRAPEZOIDAL_SSD, None, "cpu", torch.bfloat16) == "cpu"
    assert dispatch.choose_name(TRAPEZOIDAL_SSD, None, "cpu", torch.float64) == "portable"
    with pytest.raises(BackendError, match=r"it takes torch.float32, .* given torch.float64"):
        op(**to_double(inputs(1, 3, 1)), backend="cpu")  # type: ignore[arg-type]
