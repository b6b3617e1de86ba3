"""Calls of short kernels by several threads: every task once, whoever comes, and the same numbers for any number."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.causal_conv1d_update import causal_conv1d_update
from plait.ops.norm_linear import norm_linear
from plait.ops.numba_team import Kernel, Program, call, floats, integers, recording
from plait.ops.selective_state_update import selective_state_update
from plait.ops.ssd_update import ssd_update
from tests.ops.helpers import assert_close

TASKS = 1000


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _count(first: Any, last: Any, words: Any) -> None:
    """counts[task] += weight, for every task."""
    p = integers(words)
    counts = floats(p[0])
    for task in range(first, last):
        counts[task] += p[1]


COUNT = Kernel("count", _count)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_task_is_done_once(threads: int) -> None:
    torch.set_num_threads(threads)
    counts = torch.zeros(TASKS)
    for number in range(1, 301):
        call(COUNT, TASKS, counts.data_ptr(), 1, keep=(counts,))
        assert (counts == number).all(), number


def test_calls_with_no_task_and_with_one() -> None:
    counts = torch.zeros(2)
    call(COUNT, 0, counts.data_ptr(), 1, keep=(counts,))
    call(COUNT, 1, counts.data_ptr(), 5, keep=(counts,))
    assert counts.tolist() == [5, 0]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_recording_is_not_run_and_runs_in_order_as_often_as_wanted(threads: int) -> None:
    torch.set_num_threads(threads)
    counts, entries, kept = torch.zeros(TASKS), [], []

    def note(kernel: Kernel, entry: tuple[int, ...], keep: Sequence[Tensor | None]) -> None:
        assert kernel is COUNT
        entries.append(entry)
        kept.append(keep)

    with recording(note):
        for tasks, weight in ((TASKS, 1), (1, 10), (7, 100), (0, 1000)):
            call(COUNT, tasks, counts.data_ptr(), weight, keep=(counts,))
    assert counts.sum() == 0 and len(kept) == 4
    program = Program(entries)
    for number in range(1, 101):
        program()
        assert counts[0] == 111 * number and counts[6] == 101 * number and (counts[7:] == number).all()
    call(COUNT, TASKS, counts.data_ptr(), 1, keep=(counts,))
    assert counts[-1] == 101  # outside, calls are made again


def test_calls_from_several_threads_at_once() -> None:
    torch.set_num_threads(2)
    counts = [torch.zeros(TASKS) for _ in range(4)]

    def work(own: Tensor) -> None:
        for _ in range(200):
            call(COUNT, TASKS, own.data_ptr(), 1, keep=(own,))

    callers = [threading.Thread(target=work, args=(own,)) for own in counts]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all((own == 200).all() for own in counts)


def test_a_recording_is_its_own_threads() -> None:
    """Another thread's calls are made while this one records."""
    counts = torch.zeros(TASKS)
    with recording(lambda kernel, entry, keep: None):
        other = threading.Thread(
            target=lambda: call(COUNT, TASKS, counts.data_ptr(), 1, keep=(counts,)), daemon=True
        )
        other.start()
        other.join()
    assert (counts == 1).all()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_too() -> None:
    torch.set_num_threads(2)
    counts = torch.zeros(TASKS)
    call(COUNT, TASKS, counts.data_ptr(), 1, keep=(counts,))
    child = os.fork()
    if child == 0:
        call(COUNT, TASKS, counts.data_ptr(), 1, keep=(counts,))
        os._exit(0 if (counts == 2).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _norm_linear(rows: int, backend: str = "cpu") -> list[Tensor]:
    x, weight = draw(rows, 300), draw(1000, 300)
    options = {"norm_weight": draw(300), "eps": 1e-5, "residual": draw(rows, 1000), "backend": backend}
    return [norm_linear(x, weight, draw(1000), **options)]


def _convolution(rows: int, backend: str = "cpu") -> list[Tensor]:
    state = draw(rows, 3, 700)
    return [
        causal_conv1d_update(draw(rows, 700), state, draw(700, 4), activation="silu", backend=backend),
        state,
    ]


def _selective(rows: int, backend: str = "cpu") -> list[Tensor]:
    state = draw(rows, 400, 16)
    y = selective_state_update(
        draw(rows, 400), draw(rows, 9), -draw(400, 16).exp(), draw(rows, 16), draw(rows, 16, seed=1), draw(400), state,
        z=draw(rows, 400, seed=1), dt_bias=draw(400), dt_softplus=True, dt_weight=draw(400, 9), backend=backend,
    )  # fmt: skip
    return [y, state]


def _ssd(rows: int, backend: str = "cpu") -> list[Tensor]:
    heads, width, states = 6, 20, 24
    channels = heads * width + 2 * states
    conv, ssm = draw(rows, 3, channels), draw(rows, heads, width, states)
    u = ssd_update(
        draw(rows, heads * width), draw(rows, channels), draw(rows, heads), conv, ssm, draw(channels, 4), None,
        -draw(heads).exp(), draw(heads), draw(heads), ngroups=1, backend=backend,
    )  # fmt: skip
    return [u, conv, ssm]


@pytest.mark.parametrize("op", [_norm_linear, _convolution, _selective, _ssd])
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_do_not_depend_on_the_number_of_threads(op: Any, rows: int) -> None:
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(op(rows))
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("op", [_norm_linear, _convolution, _selective, _ssd])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_task_reads_what_is_its_own(op: Any, rows: int) -> None:
    """More channels than one task has, against the reference."""
    for got, want in zip(op(rows), op(rows, "reference"), strict=True):
        assert_close(got, want, 1e-5, op.__name__)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (16, 7), (33, 100), (64, 77)])
def test_linear_maps_of_every_number_of_rows_and_channels(rows: int, sizes: tuple[int, int]) -> None:
    """All tiles of the product, and what is left over beside them; more rows than it takes are torch's."""
    channels, outputs = sizes
    x, weight, bias = draw(rows, channels + 3)[:, 1:-2], draw(outputs, channels + 2)[:, 2:], draw(outputs)
    got = norm_linear(x, weight, bias, backend="cpu")
    assert_close(got, (x.double() @ weight.double().T + bias.double()).float(), 1e-5, "y")


def test_states_stay_where_they_are() -> None:
    state = draw(3, 3, 40)
    before, address = state.clone(), state.data_ptr()
    x = draw(3, 40)
    causal_conv1d_update(x, state, draw(40, 4), backend="cpu")
    assert state.data_ptr() == address
    assert torch.equal(state, torch.cat([before[:, 1:], x[:, None]], 1))
