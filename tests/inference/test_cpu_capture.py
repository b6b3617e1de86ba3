"""Decoding steps recorded on a CPU: the same numbers as steps, bit for bit, and nothing done while recording."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.inference.cpu_capture import CpuCapture
from plait.inference.decoding import decode, prefill, start
from plait.inference.generate import generate
from plait.inference.graphs import WORTHWHILE, StepGraphs, usable
from plait.ops.causal_conv1d_update import causal_conv1d_update
from plait.ops.dispatch import use_backend
from tests.inference.helpers import PATTERNS, make_model, tokens
from tests.ops.helpers import assert_close

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8]]
STEPS = 70  # attention's bound of the past changes on the way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_recorded_steps_are_the_steps(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype=dtype)
    own, recorded = (model.new_cache(len(PROMPTS), 100) for _ in range(2))
    for cache in (own, recorded):
        prefill(model, PROMPTS, cache)
    graphs = StepGraphs(model, recorded)
    addresses = [t.data_ptr() for state in recorded.states for t in state.values()]
    for ids in torch.tensor(tokens(*[STEPS] * len(PROMPTS))).unbind(1):
        want, got = decode(model, ids, own), graphs(ids)
        assert torch.equal(got, want)
    assert addresses == [t.data_ptr() for state in recorded.states for t in state.values()]
    assert torch.equal(own.positions, recorded.positions) and own.lengths == recorded.lengths
    for a, b in zip(own.states, recorded.states, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def recorded(function: Callable[[], None]) -> Callable[[], object]:
    return CpuCapture()(function)


def test_recording_changes_nothing() -> None:
    state, out = torch.ones(3), torch.zeros(3)

    def step() -> None:
        state.mul_(2)
        out.copy_(state + 1)

    replay = recorded(step)
    assert state.tolist() == [1, 1, 1] and out.tolist() == [0, 0, 0]
    for number in range(1, 4):
        replay()
        assert state.tolist() == [2.0**number] * 3 and out.tolist() == [2.0**number + 1] * 3


def test_a_constant_that_is_changed_is_made_anew_and_others_are_not() -> None:
    x, out, made = torch.ones(2), torch.zeros(2), []

    def step() -> None:
        sums, same = torch.zeros(2), torch.full_like(x, 5)
        sums.add_(x)
        made.append(same)
        out.copy_(sums + same)

    replay = recorded(step)
    for number in range(1, 4):
        x.fill_(number)
        replay()
        assert out.tolist() == [number + 5.0] * 2
    made[0].fill_(7)  # nobody writes it again
    replay()
    assert out.tolist() == [10, 10]


def test_a_constant_that_a_kernel_changes_is_made_anew() -> None:
    x, weight, out = torch.ones(1, 4), torch.ones(4, 3), torch.zeros(1, 4)

    def step() -> None:
        window = torch.zeros(1, 2, 4)  # the kernel moves x into it
        out.copy_(causal_conv1d_update(x, window, weight, backend="cpu"))

    replay = recorded(step)
    for _ in range(3):
        replay()
        assert (out == 1).all()


def test_operations_that_write_into_given_memory_and_that_turn_a_tensor() -> None:
    x, room, out = torch.arange(6.0).view(2, 3), torch.empty(2, 3), torch.zeros(3, 2)
    sums = torch.zeros(3)

    def step() -> None:
        torch.mul(x, 2, out=room)
        turned = room + 0
        sums.copy_((turned * 3).sum(0))
        turned.transpose_(0, 1)
        out.copy_(turned)

    replay = recorded(step)
    for _ in range(2):
        x.add_(1)
        room.fill_(-1)
        replay()
        assert torch.equal(out, 2 * x.T) and torch.equal(sums, 6 * x.sum(0))


@pytest.mark.parametrize(
    "step",
    [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.equal(x + 1)],
    ids=["item", "nonzero", "mask", "equal"],
)
def test_what_decides_from_numbers_cannot_be_recorded(step: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        recorded(lambda: step(torch.ones(3)) and None)


def test_a_cpu_records_many_steps() -> None:
    model = make_model("mamba", dtype=torch.float32)
    assert usable(model, WORTHWHILE) and not usable(model, WORTHWHILE - 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not usable(model, WORTHWHILE)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "hybrid"])
@pytest.mark.parametrize("rows", [1, 3])
def test_kernels_and_plain_torch_write_the_same(name: str, rows: int) -> None:
    """Greedy ids wherever the best two logits are apart, and the logits after each, with the same tokens fed."""
    model = make_model(name, dtype=torch.float32)
    prompts = PROMPTS[:rows]
    with use_backend("portable"):
        plain = start(model, prompts, 40, graphs=False)
    kernels = start(model, prompts, 40)
    for _ in range(40):
        assert_close(kernels.logits, plain.logits, 1e-4, "logits")
        best = plain.logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2e-4 * plain.logits.abs().amax(1)
        ids = plain.logits.argmax(1)
        assert torch.equal(kernels.logits.argmax(1)[clear], ids[clear])
        with use_backend("portable"):
            plain.feed(ids)
        kernels.feed(ids)


def test_generation_goes_on_when_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that shrinks is recorded anew, and writes what it writes without a recording."""
    model = make_model("hybrid", dtype=torch.float32)
    free = generate(model, PROMPTS, max_new_tokens=30, seed=1, graphs=False)
    want, got = (
        generate(model, PROMPTS, max_new_tokens=30, seed=1, eos_token_id=free[0][20], graphs=graphs)
        for graphs in (False, True)
    )
    assert got == want and len({len(row) for row in got}) > 1
