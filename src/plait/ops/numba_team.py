"""Short kernels on several threads without the price of a call: what decoding on a CPU consists of.

A kernel here is a native function (first task, last task, address of its words): numbers and the addresses of tensors,
so a call unpacks nothing. Calls can be recorded (`recording`), and what was recorded runs as one (`Program`): the
threads come together once and then wait for the next call awake, as waking one takes as long as a whole layer.
Whoever leads goes to work at once and takes all tasks that nobody else takes: who comes late is not waited for.

Tasks write to places of their own, so which thread computes one changes no number.
"""

from __future__ import annotations

import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.np import arrayobj
from torch import Tensor

from plait.ops.numba_run import compiling
from plait.ops.numba_support import FLAGS, KERNEL, PIECE
from plait.ops.threads import pool

intrinsic: Any = _intrinsic  # its stubs count the parameters of a caller wrongly

_PARTS = 1
"""A thread takes its part of what is left, divided by this: long runs of memory first, and at the end nobody waits."""
_PATIENCE = 2000
"""Looks at what another thread will write before the core is offered to others: some thirty microseconds."""
_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
_SIGNATURE = types.void(types.int64, types.int64, types.int64)
_HEAD = 3  # of an entry of a program: the function, its tasks, how many words follow
# places of the numbers that threads share, a cache line apart where several write
_GATE, _NEXT, _FUNCTION, _TASKS, _WORDS, _MEMBERS, _ENTERED, _DONE, _SIZE = 0, 8, 16, 17, 18, 19, 24, 32, 40
# the gate: whether it is open, how many are inside, and above that the number of the call
_OPEN, _CALL = 1 << 31, 32


def _place(context: Any, b: Any, sig: Any, args: Any) -> Any:
    return b.gep(context.make_array(sig.args[0])(context, b, args[0]).data, [args[1]])


@intrinsic
def add(typing: Any, array: Any, at: Any, amount: Any) -> Any:
    """array[at] += amount as one step for all threads; what was there before."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _place(context, b, sig, args), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), lower


@intrinsic
def look(typing: Any, array: Any, at: Any) -> Any:
    """array[at], as the threads have left it by now."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.load_atomic(_place(context, b, sig, args), "seq_cst", 8)

    return types.int64(array, types.intp), lower


@intrinsic
def put(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """array[at] = value, after all that this thread wrote before."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store_atomic(args[2], _place(context, b, sig, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), lower


@intrinsic
def swap(typing: Any, array: Any, at: Any, old: Any, new: Any) -> Any:
    """array[at] = new if it was old, as one step; whether it was."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        done = b.cmpxchg(_place(context, b, sig, args), args[2], args[3], "seq_cst", "seq_cst")
        return b.extract_value(done, 1)

    return types.boolean(array, types.intp, types.int64, types.int64), lower


@intrinsic
def pause(typing: Any) -> Any:
    """Leave the core's units to its other half for a moment, where the processor knows how."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def give_way(typing: Any) -> Any:
    """Let another thread have the core, where the system knows the call by its name in C."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        if sys.platform != "win32":
            kind = ir.FunctionType(ir.IntType(32), [])
            b.call(cgutils.get_or_insert_function(b.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), lower


@njit(**PIECE)
def _rest(looks: int) -> int:
    """A moment between two looks at what another thread will write; how many there have been."""
    if looks % _PATIENCE == _PATIENCE - 1:
        give_way()
    else:
        pause()
    return looks + 1


@intrinsic
def invoke(typing: Any, function: Any, first: Any, last: Any, words: Any) -> Any:
    """function(first, last, words) of a native function by its address."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), lower


def _memory(dtype: Any) -> Any:
    """An intrinsic that gives the memory at an address as a flat array of ``dtype``, of unknown length."""
    kind = types.Array(dtype, 1, "C")

    @intrinsic
    def memory(typing: Any, address: Any) -> Any:
        def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
            array = arrayobj.make_array(kind)(context, b)
            size = context.get_constant(types.intp, dtype.bitwidth // 8)
            arrayobj.populate_array(
                array,
                data=b.inttoptr(args[0], array.data.type),
                shape=[context.get_constant(types.intp, sys.maxsize // 16)],
                strides=[size],
                itemsize=size,
                meminfo=None,
            )
            return array._getvalue()

        return kind(types.int64), lower

    return memory


floats, halves, integers, doubles = (
    _memory(kind) for kind in (types.float32, types.uint16, types.int64, types.float64)
)
"""The memory at an address: float32, bfloat16 as uint16, int64, float64."""


@njit(**PIECE)
def _work(shared: Any) -> None:
    """Take tasks of the call that the gate is open for, until none is left."""
    function, tasks, words = shared[_FUNCTION], shared[_TASKS], shared[_WORDS]
    parts = _PARTS * shared[_MEMBERS]
    task = look(shared, _NEXT)
    while task < tasks:
        share = max(1, (tasks - task) // parts)
        if swap(shared, _NEXT, task, task + share):
            invoke(function, task, task + share, words)
        task = look(shared, _NEXT)


@njit(**KERNEL)
def _join(shared: Any, program: Any, end: int) -> None:
    """Run the calls of a program up to ``end`` with all threads that come: the first leads, the others help."""
    if add(shared, _ENTERED, 1) == 0:
        _lead(shared, program, end)
        put(shared, _DONE, 1)
        return
    seen, looks = -1, 0
    while look(shared, _DONE) == 0:
        gate = look(shared, _GATE)
        call = gate >> _CALL
        if gate & _OPEN != 0 and call != seen and swap(shared, _GATE, gate, gate + 1):
            # inside, what the call is stays as it is: the leader waits until nobody is
            seen = call
            _work(shared)
            add(shared, _GATE, -1)
            looks = 0
        else:
            looks = _rest(looks)


@njit(**PIECE)
def _lead(shared: Any, program: Any, end: int) -> None:
    """The calls one after the other, each with whoever comes through the gate while it is open."""
    base, begin, call = program.ctypes.data, 0, 0
    while begin < end:
        function, tasks, words = program[begin], program[begin + 1], base + 8 * (begin + _HEAD)
        begin += _HEAD + program[begin + 2]
        if tasks == 1:
            invoke(function, 0, 1, words)
            continue
        shared[_FUNCTION], shared[_TASKS], shared[_WORDS] = function, tasks, words
        put(shared, _NEXT, 0)
        call += 1
        put(shared, _GATE, call << _CALL | _OPEN)
        _work(shared)
        add(shared, _GATE, -_OPEN)
        looks = 0
        while look(shared, _GATE) & (_OPEN - 1) != 0:
            looks = _rest(looks)


@njit(**KERNEL)
def _alone(program: Any, end: int) -> None:
    """The same by this thread alone."""
    base, begin = program.ctypes.data, 0
    while begin < end:
        invoke(program[begin], 0, program[begin + 1], base + 8 * (begin + _HEAD))
        begin += _HEAD + program[begin + 2]


class Kernel:
    """A function (first task, last task, address of words) that Numba compiles when it is first called."""

    def __init__(self, name: str, function: Callable[[Any, Any, Any], None]) -> None:
        self.name = name
        self._function = function

    @cached_property
    def address(self) -> int:
        """Where the native function is."""
        with compiling():
            native = cfunc(_SIGNATURE, cache=True, error_model="numpy", fastmath=FLAGS)(self._function)
        _natives.append(native)  # it lives as long as its address may be called
        return int(native.address or 0)


class Team:
    """What the threads of one call share; one program at a time, and who comes meanwhile works alone."""

    def __init__(self) -> None:
        room = np.zeros(_SIZE + 8, np.int64)
        skip = -(room.ctypes.data // 8) % 8
        self._shared = room[skip : skip + _SIZE]
        self._busy = threading.Lock()
        nothing = np.zeros(0, np.int64)
        with compiling():  # before other threads come
            _alone(nothing, 0)
            _join(self._shared, nothing, 0)

    def run(self, program: np.ndarray, together: bool) -> None:
        """Run the calls of a program, ``together``: on as many threads as torch uses."""
        end = program.shape[0]
        if not together or torch.get_num_threads() == 1 or not self._busy.acquire(blocking=False):
            _alone(program, end)
            return
        try:
            shared = self._shared
            shared[_MEMBERS] = torch.get_num_threads()
            shared[_ENTERED] = shared[_DONE] = shared[_GATE] = 0
            pool().submit(lambda: _join(shared, program, end))
        finally:
            self._busy.release()


def call(kernel: Kernel, tasks: int, *words: int, keep: Sequence[Tensor | None]) -> None:
    """kernel on all tasks 0 to tasks - 1, with these words; `keep` are the tensors whose addresses are among them."""
    entry = (kernel.address, tasks, len(words), *words)
    if _recorder.get is not None:
        _recorder.get(kernel, entry, keep)
        return
    _team().run(np.array(entry, np.int64), tasks > 1)


class Program:
    """Calls that run one after the other as one."""

    def __init__(self, entries: Sequence[tuple[int, ...]]) -> None:
        self._words = np.array([word for entry in entries for word in entry], np.int64)

    def __call__(self) -> None:
        """Run them, on as many threads as torch uses now."""
        _team().run(self._words, True)


Recorder = Callable[[Kernel, tuple[int, ...], Sequence[Tensor | None]], None]


class _Recording(threading.local):
    """Who is given this thread's calls instead of the team."""

    get: Recorder | None = None


_recorder = _Recording()


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, calls are not made but given to ``recorder``: the kernel, what `Program` takes, the tensors to keep."""
    before, _recorder.get = _recorder.get, recorder
    try:
        yield
    finally:
        _recorder.get = before


def bits(number: float) -> int:
    """A float64 as the word that `doubles` reads."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def address(x: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if x is None else x.data_ptr()


_natives: list[Any] = []


@cache
def _team() -> Team:
    return Team()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_team.cache_clear)
