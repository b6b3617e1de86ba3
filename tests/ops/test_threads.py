"""The threads of the CPU kernels: torch's own where possible, and what goes wrong on one of them is told."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import pytest
import torch

from plait.ops import threads
from plait.ops.threads import OpenMPThreads, PythonThreads, Team

TEAMS: dict[str, Callable[[], Team]] = {
    "OpenMP": lambda: OpenMPThreads(threads._openmp()),
    "Python": PythonThreads,
}
needs_openmp = pytest.mark.skipif(
    threads._openmp() is None, reason="torch's OpenMP library is not one of GNU's kind"
)


@pytest.fixture(params=[pytest.param("OpenMP", marks=needs_openmp), "Python"])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield TEAMS[request.param]()
    torch.set_num_threads(before)


def test_all_threads_work_at_once_and_all_is_done_on_return(team: Team) -> None:
    meet = threading.Barrier(3, timeout=20)
    seen: set[int] = set()

    def work() -> None:
        meet.wait()  # nobody gets on before three threads are here
        seen.add(threading.get_ident())

    for _ in range(3):
        seen.clear()
        team.submit(work)
        assert len(seen) == 3 and threading.get_ident() in seen


def test_what_one_thread_raises_is_raised_when_all_are_done(team: Team) -> None:
    todo, done = chain(range(30)), list[int]()

    def work() -> None:
        for i in todo:
            if i == 3:
                raise KeyError("three")
            done.append(i)

    with pytest.raises(KeyError, match="three"):
        team.submit(work)
    team.submit(lambda: done.append(100))
    assert done[-3:] == [100, 100, 100] and len(done) >= 3 + 3


def test_from_several_threads_at_the_same_time(team: Team) -> None:
    totals = [0] * 4

    def caller(i: int) -> None:
        for _ in range(50):
            todo, seen = chain(range(100)), list[int]()
            team.submit(partial(_move, todo, seen))
            totals[i] += len(set(seen))

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert totals == [5000] * 4


def _move(todo: Iterator[int], seen: list[int]) -> None:
    for i in todo:
        seen.append(i)


@needs_openmp
def test_they_are_the_threads_that_torch_computes_with() -> None:
    """No thread is added to those that a sum over two of torch's threads has started."""
    if sys.platform != "linux":
        pytest.skip("threads are counted in /proc")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = torch.ones(1 << 22)
        _ = big * 2
        there = len(os.listdir("/proc/self/task"))
        meet = threading.Barrier(2, timeout=20)
        OpenMPThreads(threads._openmp()).submit(lambda: _wait(meet))
        assert len(os.listdir("/proc/self/task")) == there
    finally:
        torch.set_num_threads(before)


def _wait(meet: threading.Barrier) -> None:
    meet.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads.pool().submit(lambda: None)
        child = os.fork()
        if child == 0:
            meet = threading.Barrier(2, timeout=20)
            try:
                threads.pool().submit(lambda: _wait(meet))
                os._exit(0 if isinstance(threads.pool(), PythonThreads) else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)
