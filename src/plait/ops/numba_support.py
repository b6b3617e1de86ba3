"""What the CPU kernels share: one type of vector for Numba, threads, and torch tensors as arrays.

`VEC` is LANES float32 numbers in registers; LLVM splits it where registers are narrower. Arithmetic between vectors
and float32 scalars broadcasts, and a product that is added to something becomes one fused multiply-add. Memory is an
array of float32, or of uint16 that holds bfloat16: loads widen, stores round to nearest even. `lanes` is None for
whole vectors, or a mask from `first` for what is left at the end of a row.

This module imports Numba; only kernels import it, and those are loaded when a CPU backend is chosen. Numba's cache of
a kernel does not see changes here: touch the kernels' files after one.
"""

from __future__ import annotations

import itertools
import logging
import operator
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from torch import Tensor

LANES = 16
FLAGS = {"contract", "arcp", "nsz", "afn"}
"""What fast math the kernels allow: nothing that reorders a sum or forgets NaN and infinity."""

KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": FLAGS}
PIECE: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": FLAGS, "forceinline": True}
"""Options of numba.njit: for a kernel, and for a function that disappears into its caller."""

SMALL = 1 << 16
"""Below this many elements other threads cost more than they bring."""

_log = logging.getLogger("plait.ops")
_ready: set[Any] = set()
_compiling = threading.Lock()


def run(kernel: Any, tasks: int, work: int, *args: Any) -> None:
    """Call kernel(first, last, *args) until all tasks are done, on as many threads as torch uses.

    `work` is the number of elements in all. Tasks write to places of their own, so their order changes no number.
    The threads are Python's, without the interpreter's lock while they compute: nothing to link, and a forked child
    starts its own.
    """
    variant = (kernel, *map(_kind, args))
    if variant not in _ready:
        _compile(kernel, (0, tasks, *args))
        _ready.add(variant)
    threads = min(torch.get_num_threads(), tasks) if work >= SMALL else 1
    if threads <= 1:
        kernel(0, tasks, *args)
        return
    grain = max(1, tasks // (8 * threads))
    # taking the next range is one call under the interpreter's lock, so no two threads get the same one
    todo = itertools.chain(range(0, tasks, grain))

    def work_on() -> None:
        for begin in todo:
            kernel(begin, min(begin + grain, tasks), *args)

    others = [_pool().submit(work_on) for _ in range(threads - 1)]
    work_on()
    for other in others:
        other.result()


def flat(x: Tensor) -> np.ndarray:
    """The memory that x spans, as one array (bfloat16 as uint16): one kind of array, so one compilation, for all."""
    x = x.detach()
    if not x.is_contiguous():
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride())) if x.numel() else 0
        x = x.as_strided((span,), (1,))
    # not .numpy(): it would forbid FSDP to free the storage of a parameter it has gathered
    return np.from_dlpack((x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).view(-1))


def rows(x: Tensor) -> tuple[np.ndarray, int]:
    """x (R, E) as `flat`, and the elements from a row to the next; copied where the channels lie apart."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return flat(x), x.stride(0)


def _kind(a: Any) -> Any:
    """What tells the types of arguments apart: arrays are all flat, tuples hold zeros."""
    if isinstance(a, np.ndarray):
        return a.dtype
    return a if isinstance(a, tuple) else type(a)


def _compile(kernel: Any, args: tuple[Any, ...]) -> None:
    """Compile `kernel` for these arguments, or load it from Numba's cache; say so to who has to wait."""
    with _compiling:
        timer = threading.Timer(1.0, _say_compiling)
        timer.daemon = True
        timer.start()
        try:
            kernel.compile(tuple(numba.typeof(a) for a in args))
        finally:
            timer.cancel()


@cache
def _say_compiling() -> None:
    _log.warning("compiling CPU kernels, once per machine")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="plait-cpu")


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_pool.cache_clear)


class _VecType(types.Type):
    def __init__(self) -> None:
        super().__init__(f"Vec({LANES})")


class _MaskType(types.Type):
    def __init__(self) -> None:
        super().__init__(f"Mask({LANES})")


VEC, MASK = _VecType(), _MaskType()
_F32, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_VF, _VI, _VH, _VB = (ir.VectorType(t, LANES) for t in (_F32, _I32, _I16, ir.IntType(1)))


@register_model(_VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VF)


@register_model(_MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VB)


def _ints(value: int, kind: Any = _VI) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_VF, [float(np.float32(value))] * LANES)


def _splat(b: Any, x: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    return b.shuffle_vector(b.insert_element(nothing, x, _I32(0)), nothing, _ints(0))


def _call(b: Any, name: str, result: Any, args: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _define_operator(op: Any, instruction: str) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and VEC in args and all(a == VEC or isinstance(a, types.Float) for a in args):
                return signature(VEC, *(VEC if a == VEC else types.float32 for a in args))
            return None

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x, y = (a if t == VEC else _splat(b, a) for a, t in zip(args, sig.args))
        return getattr(b, instruction)(x, y, flags=("contract",))

    for first_kind, second_kind in ((_VecType, _VecType), (_VecType, types.Float), (types.Float, _VecType)):
        lower_builtin(op, first_kind, second_kind)(lower)


for _op, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_op, _instruction)


@intrinsic
def zeros(typing: Any) -> Any:
    """A vector of zeros."""
    return VEC(), lambda context, b, sig, args: _floats(0.0)


@intrinsic
def first(typing: Any, count: Any) -> Any:
    """The mask of the first `count` lanes."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        lane = ir.Constant(_VI, list(range(LANES)))
        return b.icmp_signed("<", lane, _splat(b, b.trunc(args[0], _I32)))

    return MASK(types.intp), lower


def _pointer(context: Any, b: Any, kind: Any, value: Any, at: Any, vector: Any) -> Any:
    base = context.make_array(kind)(context, b, value).data
    return b.bitcast(b.gep(base, [at]), vector.as_pointer())


def _layout(kind: Any) -> tuple[Any, str, int]:
    """The vector in memory of an array type, its name in intrinsics, and its alignment in bytes."""
    if kind.dtype == types.uint16:
        return _VH, f"v{LANES}i16", 2
    assert kind.dtype == types.float32, kind
    return _VF, f"v{LANES}f32", 4


@intrinsic
def load(typing: Any, source: Any, at: Any, lanes: Any) -> Any:
    """The vector that begins `at` elements after the beginning of the array; lanes that are off give 0."""
    vector, name, align = _layout(source)

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        p = _pointer(context, b, source, args[0], args[1], vector)
        if lanes == MASK:
            zero = ir.Constant(vector, [0] * LANES) if vector is _VH else _floats(0.0)
            x = _call(b, f"llvm.masked.load.{name}.p0", vector, [p, _I32(align), args[2], zero])
        else:
            x = b.load(p)
            x.align = align
        return b.bitcast(b.shl(b.zext(x, _VI), _ints(16)), _VF) if vector is _VH else x

    return VEC(source, types.intp, lanes), lower


@intrinsic
def store(typing: Any, target: Any, at: Any, x: Any, lanes: Any) -> Any:
    """Write a vector `at` elements after the beginning of the array; lanes that are off are left alone."""
    vector, name, align = _layout(target)

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        p = _pointer(context, b, target, args[0], args[1], vector)
        value = _bfloat16(b, args[2]) if vector is _VH else args[2]
        if lanes == MASK:
            _call(b, f"llvm.masked.store.{name}.p0", ir.VoidType(), [value, p, _I32(align), args[3]])
        else:
            b.store(value, p).align = align
        return context.get_dummy_value()

    return types.void(target, types.intp, x, lanes), lower


@intrinsic
def prefetch(typing: Any, source: Any, at: Any) -> Any:
    """Have the memory at `at`, which may lie outside the array, in the cache soon."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        p = b.bitcast(
            b.gep(context.make_array(source)(context, b, args[0]).data, [args[1]]), _I8.as_pointer()
        )
        _call(b, "llvm.prefetch.p0", ir.VoidType(), [p, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(source, types.intp), lower


def _bfloat16(b: Any, x: Any) -> Any:
    """Round to nearest even; NaN stays NaN."""
    bits = b.bitcast(x, _VI)
    odd = b.and_(b.lshr(bits, _ints(16)), _ints(1))
    rounded = b.lshr(b.add(b.add(bits, _ints(0x7FFF)), odd), _ints(16))
    return b.trunc(b.select(b.fcmp_unordered("uno", x, x), _ints(0x7FC0), rounded), _VH)


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum over the lanes, always in the same order."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        v, n = args[0], LANES
        while n > 1:
            n //= 2
            nothing, kind = ir.Constant(v.type, ir.Undefined), ir.VectorType(_I32, n)
            low, high = ([i + k * n for i in range(n)] for k in (0, 1))
            v = b.fadd(
                b.shuffle_vector(v, nothing, ir.Constant(kind, low)),
                b.shuffle_vector(v, nothing, ir.Constant(kind, high)),
            )
        return b.extract_element(v, _I32(0))

    return types.float32(x), lower


# 2^f for |f| <= 1/2, from the highest power, fitted for the least relative error (2e-9)
_EXP2 = (1.5353363e-4, 1.3398880e-3, 9.6184374e-3, 5.5503325e-2, 2.4022648e-1, 6.9314720e-1, 1.0)
_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits


@intrinsic
def exp2(typing: Any, x: Any) -> Any:
    """2^x: infinite from 127.5 on, never below 2^-126; NaN stays NaN."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        t = args[0]
        t = b.select(b.fcmp_ordered("<", t, _floats(-126.0)), _floats(-126.0), t)
        t = b.select(b.fcmp_ordered(">", t, _floats(128.0)), _floats(128.0), t)
        shifted = b.fadd(t, _floats(_ROUND))
        f = b.fsub(t, b.fsub(shifted, _floats(_ROUND)))
        p = _floats(_EXP2[0])
        for coefficient in _EXP2[1:]:
            p = _call(b, f"llvm.fma.v{LANES}f32", _VF, [p, f, _floats(coefficient)])
        power = b.shl(b.add(b.bitcast(shifted, _VI), _ints(127)), _ints(23))
        return b.fmul(p, b.bitcast(power, _VF))

    return VEC(x), lower


_MINUS_LOG2_E = np.float32(-1.4426950408889634)
_ONE = np.float32(1.0)


@numba.njit(**PIECE)
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) of a vector."""
    return _ONE / (_ONE + exp2(x * _MINUS_LOG2_E))
