"""The threads that the CPU kernels run on: torch's own, where its OpenMP library can be asked.

torch's threads spin for milliseconds after each of its operations, waiting for the next. Threads of ours would share
their cores with them: between matrix products, on two cores, a scan took as long on two such threads as on one.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

Work = Callable[[], None]


class Team(Protocol):
    """Threads that do the same work together."""

    def submit(self, work: Work) -> None:
        """Call ``work`` on as many threads as torch uses, this one among them, and return when all are done.

        What one of the calls raises is raised here.
        """


@cache
def pool() -> Team:
    """This process's threads."""
    entry = None if _forked else _openmp()
    return PythonThreads() if entry is None else OpenMPThreads(entry)


class PythonThreads:
    """Threads of our own, which need no library."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="plait-cpu")

    def submit(self, work: Work) -> None:
        """See ``Team``."""
        others = [self.pool.submit(work) for _ in range(torch.get_num_threads() - 1)]
        work()
        for other in others:
            other.result()


class OpenMPThreads:
    """torch's threads; ``entry`` is GOMP_parallel(function, data, threads, flags) of the library that torch uses.

    A call of Python from another thread holds the interpreter's lock only until it has entered compiled code.
    """

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self.work: dict[int, tuple[Work, list[BaseException]]] = {}
        self.numbers = itertools.count(1)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        entry.argtypes, entry.restype = [kind, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        self.enter = kind(self._enter)

    def submit(self, work: Work) -> None:
        """See ``Team``."""
        number, failed = next(self.numbers), list[BaseException]()
        self.work[number] = work, failed
        try:
            # always all of torch's threads: the library would end those that one call leaves out
            self.entry(self.enter, number, torch.get_num_threads(), 0)
        finally:
            del self.work[number]
        if failed:
            raise failed[0]

    def _enter(self, number: int) -> None:
        work, failed = self.work[number]
        try:
            work()
        except BaseException as fault:  # nothing may pass through the library; it is raised when all are done
            failed.append(fault)


_forked = False


def _openmp() -> Any:
    """The entry of the library that torch was linked with; None if there is none, or none of that kind.

    Asked of torch's library, the loader answers for those that it needs: another copy would have threads of its own.
    """
    library = Path(str(torch.__file__)).parent / "lib" / "libtorch_cpu.so"
    if not (sys.platform == "linux" and torch.backends.openmp.is_available() and library.is_file()):
        return None
    try:
        return ctypes.CDLL(str(library)).GOMP_parallel
    except (AttributeError, OSError):
        return None


def _in_a_child() -> None:
    """A forked process has none of its parent's threads, and GNU's library does not notice."""
    global _forked
    _forked = True
    pool.cache_clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_in_a_child)
