"""The Triton kernels of Mamba-2's and Mamba-3's ops in Triton's interpreter: tiny shapes, the float64 reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.config.errors import BackendError
from plait.ops import dispatch
from plait.ops.ssd import SSD, TRAPEZOIDAL_SSD, ssd
from tests.ops import test_ssd as two
from tests.ops import test_trapezoidal_ssd as three
from tests.ops.helpers import Run, assert_same_run, cumulative, random_lengths, rms_error, run, to_double

pytest.importorskip("triton", reason="not on this platform")

from plait.ops.ssd import gpu, gpu_engine, gpu_trapezoid
from plait.ops.triton_support import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET.value, reason="not on this platform: here tests/gpu runs them")

few = settings(max_examples=6, deadline=None, derandomize=True, database=None)
FLOAT = torch.float32


def kernels(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(three.op if "v" in tensors else ssd, tensors, backend="gpu", **options)


def reference(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(three.op if "v" in tensors else ssd, to_double(tensors), backend="reference", **options)


def small(rows: int = 1, length: int = 20, n_seq: int = 1, **options: Any) -> dict[str, Tensor | None]:
    return two.inputs(rows, length, n_seq, **{"dtype": FLOAT, "heads": 2, "groups": 1, **options})


def small3(rows: int = 1, length: int = 20, n_seq: int = 1, **options: Any) -> dict[str, Tensor | None]:
    return three.inputs(rows, length, n_seq, **{"dtype": FLOAT, "heads": 2, "rank": 1, **options})


@few
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2]), "groups")
    shape: dict[str, Any] = {
        "groups": groups,
        "heads": groups * data.draw(st.sampled_from([1, 2]), "heads a group"),
        "width": data.draw(st.sampled_from([3, 20]), "width"),
        "state": data.draw(st.sampled_from([5, 17]), "state"),
        "decay": data.draw(st.sampled_from(["weak", "strong", "mixed"]), "decay"),
        "seed": data.draw(st.integers(0, 99), "seed"),
    }
    packed = data.draw(st.booleans(), "packed")
    length = data.draw(st.sampled_from([1, 5, 15, 16, 17, 33]), "length")
    count = data.draw(st.integers(1, 5), "sequences")
    options: dict[str, Any] = {"dt_softplus": data.draw(st.booleans(), "softplus")}
    if packed:
        options["cu_seqlens"] = cumulative(random_lengths(length, count, shape["seed"]))
    else:
        count = min(count, 2)
    if data.draw(st.booleans(), "limits"):
        options["dt_limit"] = (0.3, 0.9)
    tensors = two.inputs(1 if packed else count, length, count, dtype=FLOAT, **shape)
    if data.draw(st.booleans(), "D of every channel"):
        tensors["D"] = torch.randn(shape["heads"], shape["width"])
    if data.draw(st.booleans(), "without options"):
        tensors |= {"D": None, "dt_bias": None, "initial_state": None}
    assert_same_run(kernels(tensors, **options), reference(tensors, **options), 1e-5)


@few
@given(data=st.data())
def test_mamba3_equals_the_reference(data: st.DataObject) -> None:
    rank = data.draw(st.sampled_from([1, 2, 3]), "rank")
    packed = data.draw(st.booleans(), "packed")
    length = data.draw(st.sampled_from([1, 7, 17]), "length")
    count = data.draw(st.integers(1, 5), "sequences") if packed else 1
    seed = data.draw(st.integers(0, 99), "seed")
    options = {"cu_seqlens": cumulative(random_lengths(length, count, seed))} if packed else {}
    decay = data.draw(st.sampled_from(["weak", "strong", "mixed"]), "decay")
    width = data.draw(st.sampled_from([3, 17]), "width")
    tensors = small3(1, length, count, rank=rank, decay=decay, width=width, seed=seed)
    if data.draw(st.booleans(), "without options"):
        tensors |= dict.fromkeys(("D", "ssm", "last_k", "last_v"))
        if rank == 1:
            tensors["rank_in"] = None
    assert_same_run(kernels(tensors, **options), reference(tensors, **options), 1e-5)


@pytest.mark.parametrize("kind", [FLOAT, torch.float16], ids=["float32", "16 bits"])
def test_mamba3_where_one_kernel_cannot_hold_all(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward as of GPUs before Hopper: the kernels of Mamba-2, for groups of one head."""
    monkeypatch.setattr(gpu_engine, "holds_own", lambda device: False)
    gpu_engine.plans.clear()
    tensors = small3(length=20, decay="weak")
    tensors |= {name: tensors[name].to(kind) for name in ("v", "k", "q")} | {"D": None}  # type: ignore[union-attr]
    got = kernels(tensors)
    gpu_engine.plans.clear()
    assert_same_run(got, reference(tensors), 1e-5 if kind == FLOAT else 1e-3)


@pytest.mark.parametrize(("low", "high"), [(1e-6, 20.0), (19.0, 20.0), (80.0, 120.0)])
def test_decays_of_any_strength(low: float, high: float) -> None:
    tensors = small(length=40, n_seq=2, groups=2)
    strength = low * (high / low) ** torch.rand(1, 40, 2)
    tensors |= {"A": torch.full((2,), -high), "dt": strength / high, "dt_bias": None}
    options: dict[str, Any] = {"cu_seqlens": cumulative([23, 17])}
    # exp(-90) has few digits left in float32
    assert_same_run(kernels(tensors, **options), reference(tensors, **options), 1e-5 if high <= 20 else 1e-3)


def test_the_gradient_of_a_long_float32_row_is_exact() -> None:
    """Weak steps among strong ones, in blocks as long as a GPU has: a float32 sum of steps would be too coarse."""
    tensors = small(length=150, heads=1)
    tensors["dt"] = torch.where(torch.rand(1, 150, 1) < 0.3, 20.0, 0.02)
    tensors["A"] = -torch.ones(1)
    wide = gpu_engine.Config(64, 16, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_engine, "choose_config", lambda *_: wide)
        gpu_engine.plans.clear()
        assert_same_run(kernels(tensors), reference(tensors), 1e-5)
    gpu_engine.plans.clear()


@pytest.mark.parametrize("groups", [1, 2])
def test_sixteen_bits_cost_only_rounding(groups: int) -> None:
    """float16, which the interpreter multiplies rightly: the path that bfloat16 takes on a GPU."""
    tensors = small(length=40, groups=groups, decay="weak")
    tensors |= {name: tensors[name].half() for name in ("x", "B", "C", "dt")}  # type: ignore[union-attr]
    got, want = kernels(tensors, dt_softplus=True), reference(tensors, dt_softplus=True)
    assert [t.dtype for t in got.outputs] == [torch.float16, FLOAT]
    assert {name: t.dtype for name, t in got.grads.items()} == {
        n: t.dtype for n, t in tensors.items() if t is not None
    }
    assert_same_run(got, want, 7e-4)


def test_mamba3_takes_keys_of_another_dtype() -> None:
    tensors = small3(decay="weak")
    tensors["v"] = tensors["v"].half()  # type: ignore[union-attr]
    got = kernels(tensors)
    assert got.grads["k"].dtype == FLOAT and got.grads["v"].dtype == torch.float16
    assert_same_run(got, reference(tensors), 1e-3)


def test_slices_of_a_projection() -> None:
    wide = torch.randn(2, 18, 2 * 3 + 2 * 5 + 2)
    x, b, c, dt = wide.split([6, 5, 5, 2], -1)
    tensors = small(2, 18, 2)
    tensors |= {"x": x.unflatten(-1, (2, 3)), "dt": dt, "B": b.unsqueeze(2), "C": c.unsqueeze(2)}
    got = gpu.ssd(
        *(tensors[n] for n in ("x", "dt", "A", "B", "C", "D")),  # type: ignore[arg-type]
        dt_bias=tensors["dt_bias"],
        dt_softplus=True,
        dt_limit=(0.0, 9.0),
        initial_state=tensors["initial_state"],
        cu_seqlens=None,
        max_len=None,
    )
    want = reference(tensors, dt_softplus=True, dt_limit=(0.0, 9.0))
    assert rms_error(got[0], want.outputs[0]) < 1e-5 and rms_error(got[1], want.outputs[1]) < 1e-5
    turned = tensors | {"x": tensors["x"].transpose(2, 3).contiguous().transpose(2, 3)}  # type: ignore[union-attr]
    assert_same_run(kernels(turned), kernels(tensors), 0.0)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_few_tokens_are_taken_one_by_one(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = small(3, length, 3, width=20, state=17)
    launched = []
    launch = gpu_engine.Plan.launch
    monkeypatch.setattr(
        gpu_engine.Plan, "launch", lambda self, k, *a: launched.append(k.__name__) or launch(self, k, *a)
    )
    gpu_engine.plans.clear()
    with torch.no_grad():
        y, final = ssd(**tensors, dt_softplus=True, backend="gpu")  # type: ignore[arg-type]
    assert launched == ["step_kernel"]
    want = reference(tensors, dt_softplus=True)
    assert rms_error(y, want.outputs[0]) < 1e-6 and rms_error(final, want.outputs[1]) < 1e-6


@pytest.mark.parametrize("decay", ["weak", "mixed"])
def test_pieces_and_shares_change_nothing_but_rounding(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed: for the strongest head a piece hands on only what its last tokens add."""
    tensors = small(length=70, heads=4, decay=decay)
    whole = reference(tensors)
    for programs in (1, 6):
        gpu_engine.plans.clear()
        monkeypatch.setattr(gpu_engine, "multiprocessors", lambda _, n=programs: n)
        cuts = []
        cut = gpu_engine.Plan.cut
        with monkeypatch.context() as patch:
            patch.setattr(gpu_engine.Plan, "cut", lambda self, t: cuts.append(cut(self, t)) or cuts[-1])  # noqa: B023
            assert_same_run(kernels(tensors), whole, 1e-5)
        assert {c.pieces for c in cuts} == ({1} if programs == 1 else {3})
    gpu_engine.plans.clear()


def test_no_tokens_and_no_sequences() -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 5, 0, None),
        (1, 0, 3, cumulative([0, 0, 0])),
        (1, 0, 0, cumulative([])),
    ]:
        for tensors in (small(rows, length, n_seq), small3(rows, length, n_seq)):
            got = kernels(tensors, cu_seqlens=cu, max_len=None if cu is None else 0)
            want = reference(tensors, cu_seqlens=cu)
            assert_same_run(got, want, 1e-6)


@pytest.mark.parametrize("make", [small, small3])
def test_a_sequence_without_tokens_keeps_its_state_bit_for_bit(make: Callable[..., Any]) -> None:
    tensors = make(1, 9, 4)
    state = tensors["initial_state" if make is small else "ssm"]
    state[0, 0, 0, :2] = torch.tensor([-0.0, float("inf")])
    got = kernels(
        {n: None if t is None else t for n, t in tensors.items()}, cu_seqlens=cumulative([0, 9, 0, 0])
    )
    for s in (0, 2, 3):
        assert torch.equal(got.outputs[1][s].view(torch.int32), state[s].view(torch.int32))


def test_nothing_of_one_document_reaches_another() -> None:
    lengths = [18, 1, 0, 17]
    tensors = small(1, sum(lengths), 4)
    for name in two.PER_TOKEN:
        tensors[name][:, 18:19] = float("nan")  # type: ignore[index]
    tensors["initial_state"][1] = float("nan")  # type: ignore[index]
    got = kernels(tensors, cu_seqlens=cumulative(lengths))
    y, final = got.outputs
    assert y[0, 18].isnan().all() and final[1].isnan().all()
    y[0, 18], final[1] = 0, 0
    assert not y.isnan().any() and not final.isnan().any()
    for name in two.PER_TOKEN:
        got.grads[name][0, 18] = 0
        assert not got.grads[name].isnan().any()


def test_nothing_looks_ahead() -> None:
    tensors = small(length=40, dtype=FLOAT)
    before = kernels(tensors).outputs[0]
    for name in two.PER_TOKEN:
        tensors[name][:, 21] += 1  # type: ignore[index]
    after = kernels(tensors).outputs[0]
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21:], after[:, 21:])


@pytest.mark.parametrize("make", [small, small3])
def test_every_element_is_written_and_two_runs_are_equal(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory that holds NaN when it is given out."""
    tensors = make(1, 37, 4)
    options: dict[str, Any] = {"cu_seqlens": cumulative([18, 0, 1, 18])}
    want = kernels(tensors, **options)
    poisoned = []

    def poison(make_empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = make_empty(*args, **kwargs)
            poisoned.append(t)
            return t.fill_(float("nan") if t.is_floating_point() else -(2**30))

        return call

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    got = kernels(tensors, **options)
    assert len(poisoned) >= 12
    assert_same_run(got, want, 0.0)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("kind", [FLOAT, torch.float16], ids=["float32", "16 bits"])
@pytest.mark.parametrize("bare", [False, True])
def test_is_a_correct_custom_op(kind: torch.dtype, bare: bool) -> None:
    """Also as Mamba-2 calls it: x, dt, B and C of 16 bits, A, D and the bias float32."""
    tensors = small(1, 9, 2)
    if bare:
        tensors |= {"D": None, "dt_bias": None, "initial_state": None}
    tensors |= {name: tensors[name].to(kind) for name in ("x", "dt", "B", "C")}  # type: ignore[union-attr]
    options = (None if bare else cumulative([6, 3]), True, 0.0, 9.0)
    leaves = [None if t is None else t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(gpu.SSD.forward, (*leaves, *options), test_utils=OPCHECKS)
    detached = [None if t is None else t.detach() for t in leaves]
    dfinal = None if bare else torch.ones(2, 2, 3, 5)
    dy = torch.ones(1, 9, 2, 3, dtype=kind)
    torch.library.opcheck(gpu.SSD.backward, (dy, dfinal, *detached, *options), test_utils=OPCHECKS)


@pytest.mark.parametrize("bare", [False, True])
def test_is_a_correct_custom_op_for_mamba3(bare: bool) -> None:
    tensors = small3(1, 5)
    given_all = [tensors[n] for n in ("v", "k", "q", "log_decay", "dt", "lam", "D", "ssm")]
    given_all[0] = given_all[0].unsqueeze(2)  # type: ignore[union-attr]
    if bare:
        given_all[-2:] = [None, None]
    cu = None if bare else cumulative([5])
    torch.library.opcheck(gpu_trapezoid.TRAPEZOID.forward, (*given_all, cu), test_utils=OPCHECKS)
    dfinal = None if bare else torch.ones(1, 2, 3, 5)
    inputs = (torch.ones(1, 5, 1, 2, 3), dfinal, *given_all, cu)
    torch.library.opcheck(gpu_trapezoid.TRAPEZOID.backward, inputs, test_utils=OPCHECKS)


@pytest.mark.parametrize("make", [small, small3])
def test_compiles_without_a_break(make: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    tensors = make(1, 20, 3)
    options: dict[str, Any] = {"cu_seqlens": cumulative([2, 0, 18]), "max_len": 18}
    fn = ssd if make is small else three.op
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert_same_run(run(compiled, tensors, backend="gpu", **options), kernels(tensors, **options), 0.0)


@pytest.mark.parametrize("row", range(len(gpu_engine.CONFIGS)))
def test_every_configuration(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size, _, _, config = gpu_engine.CONFIGS[row]
    gpu_engine.plans.clear()
    monkeypatch.setattr(gpu_engine, "choose_config", lambda *_: config)
    tensors = small(1, config.rows + 3, 1, decay="weak")
    tensors3 = small3(1, config.rows + 3, 1, decay="weak")
    if size == 2:
        # a sum of x dy that happens to be small would show the rounding of the loss's weights
        tensors |= {name: tensors[name].half() for name in ("x", "B", "C")} | {"D": None}  # type: ignore[union-attr]
        tensors3 |= {name: tensors3[name].half() for name in ("v", "k", "q")} | {"D": None}  # type: ignore[union-attr]
    for given_tensors in (tensors, tensors3):
        assert_same_run(kernels(given_tensors), reference(given_tensors), 1e-5 if size == 4 else 1e-3)
    gpu_engine.plans.clear()


def test_plans_are_kept_for_calls_alike_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_engine.plans.clear()
    monkeypatch.setattr(gpu_engine.plans, "most", 3)
    with torch.no_grad():
        for length in (5, 6, 7):
            tensors = small(1, length)
            for _ in range(2):
                ssd(**tensors, backend="gpu")  # type: ignore[arg-type]
        assert len(gpu_engine.plans) == 3
        ssd(**small(1, 8), backend="gpu")  # type: ignore[arg-type]
    assert len(gpu_engine.plans) == 1


def test_tables_fit_what_they_promise() -> None:
    """The rows are ordered, tiles hold what they are for, and float32 rows have full digits."""
    for size, largest, needed, config in gpu_engine.CONFIGS:
        assert size in (2, 4) and largest <= SSD.largest["gpu"] and needed <= 227
        assert config.states <= largest and config.columns >= 16 and config.rows >= 16
        for f in dataclasses.fields(config):
            tuning = getattr(config, f.name)
            assert not isinstance(tuning, gpu_engine.Tuning) or tuning.warps in (4, 8)
    for size, largest in ((2, 128), (2, 256), (4, 128), (4, 256)):
        assert any(
            s == size and n >= largest and kib * 1024 <= 99 * 1024 for s, n, kib, _ in gpu_engine.CONFIGS
        )


def test_automatic_goes_past_it_for_a_state_that_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_why_no_gpu", lambda: "")
    for table in (SSD, TRAPEZOIDAL_SSD):
        assert dispatch.choose_name(table, None, "cuda", torch.bfloat16, 256) == "gpu"
        assert dispatch.choose_name(table, None, "cuda", torch.bfloat16, 257) == "portable"


def test_what_it_cannot_do_is_said() -> None:
    assert dispatch.choose_name(SSD, None, "cpu", torch.float32) == "cpu"
    for table in (SSD, TRAPEZOIDAL_SSD):
        with pytest.raises(BackendError, match=r"it takes torch.float32, .* given torch.float64"):
            dispatch.choose_name(table, "gpu", "cpu", torch.float64)
    with pytest.raises(BackendError, match="a state size of at most 256, given 300"):
        ssd(**small(1, 5, 1, state=300), backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="a rank of at most 16, given 17"):
        three.op(**small3(1, 1, 1, rank=17), backend="gpu")  # type: ignore[arg-type]
