"""What the code of the CPU kernels is made of: one type of vector for Numba, and how it is loaded and stored.

`VEC` is LANES float32 numbers in registers; LLVM splits it where registers are narrower. Arithmetic between vectors
and float32 scalars broadcasts, and a product that is added to something becomes one fused multiply-add. Memory is an
array of float32, or of uint16 that holds bfloat16: loads widen, stores round to nearest even. `lanes` is None for
whole vectors, or a mask from `first` for what is left at the end of a row.

This module imports Numba; only kernels import it, and those are loaded when a CPU backend is chosen. Numba's cache of
a kernel does not see changes here: touch the kernels' files after one.
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
FLAGS = {"contract", "arcp", "nsz", "afn"}
"""What fast math the kernels allow: nothing that reorders a sum or forgets NaN and infinity."""

KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": FLAGS}
PIECE: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": FLAGS, "forceinline": True}
"""Options of numba.njit: for a kernel, and for a function that disappears into its caller."""


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


def splat(b: Any, x: Any) -> Any:
    """Code for a vector with x in all lanes."""
    nothing = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    return b.shuffle_vector(b.insert_element(nothing, x, _I32(0)), nothing, _ints(0))


def call(b: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Code that calls an LLVM function by name."""
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
        x, y = (a if t == VEC else splat(b, a) for a, t in zip(args, sig.args))
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
        return b.icmp_signed("<", lane, splat(b, b.trunc(args[0], _I32)))

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


def emit_load(context: Any, b: Any, source: Any, array: Any, at: Any, mask: Any) -> Any:
    """Code for the vector at `at` of an array of type `source`; mask None: all lanes."""
    vector, name, align = _layout(source)
    p = _pointer(context, b, source, array, at, vector)
    if mask is None:
        x = b.load(p)
        x.align = align
    else:
        zero = ir.Constant(vector, [0] * LANES) if vector is _VH else _floats(0.0)
        x = call(b, f"llvm.masked.load.{name}.p0", vector, [p, _I32(align), mask, zero])
    return b.bitcast(b.shl(b.zext(x, _VI), _ints(16)), _VF) if vector is _VH else x


def emit_store(context: Any, b: Any, target: Any, array: Any, at: Any, x: Any, mask: Any) -> Any:
    """Code that writes a vector at `at` of an array of type `target`; mask None: all lanes."""
    vector, name, align = _layout(target)
    p = _pointer(context, b, target, array, at, vector)
    value = _bfloat16(b, x) if vector is _VH else x
    if mask is None:
        b.store(value, p).align = align
    else:
        call(b, f"llvm.masked.store.{name}.p0", ir.VoidType(), [value, p, _I32(align), mask])
    return context.get_dummy_value()


@intrinsic
def load(typing: Any, source: Any, at: Any, lanes: Any) -> Any:
    """The vector that begins `at` elements after the beginning of the array; lanes that are off give 0."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return emit_load(context, b, source, args[0], args[1], args[2] if lanes == MASK else None)

    return VEC(source, types.intp, lanes), lower


@intrinsic
def store(typing: Any, target: Any, at: Any, x: Any, lanes: Any) -> Any:
    """Write a vector `at` elements after the beginning of the array; lanes that are off are left alone."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return emit_store(context, b, target, args[0], args[1], args[2], args[3] if lanes == MASK else None)

    return types.void(target, types.intp, x, lanes), lower


@intrinsic
def prefetch(typing: Any, source: Any, at: Any) -> Any:
    """Have the memory at `at`, which may lie outside the array, in the cache soon."""

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        p = b.bitcast(
            b.gep(context.make_array(source)(context, b, args[0]).data, [args[1]]), _I8.as_pointer()
        )
        call(b, "llvm.prefetch.p0", ir.VoidType(), [p, _I32(0), _I32(3), _I32(1)])
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


# 2^f for |f| <= 1/2, from the highest power, fitted for the least relative error (1.1e-7, and none at f = 0, so that
# slow decays, which are taken to high powers, are as good as float32 allows)
_EXP2 = (1.3264726e-3, 9.671513e-3, 5.5507336e-2, 2.4022242e-1, 6.93147e-1, 1.0)
_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits


def _avx512() -> bool:
    """Whether code is generated for a processor with AVX-512; Numba's own settings come before the host."""
    if config.CPU_FEATURES:
        return "+avx512f" in config.CPU_FEATURES.split(",")
    if config.CPU_NAME and config.CPU_NAME != "host":
        return config.CPU_NAME in ("x86-64-v4", "skylake-avx512", "sapphirerapids")
    return bool(llvm.get_host_cpu_features().get("avx512f"))


AVX512 = _avx512()


def emit_exp2(b: Any, x: Any) -> Any:
    """Code for 2^x of a vector: infinite from 128 on, NaN for NaN; below 2^-126 at most 2^-126."""
    if AVX512:
        all_lanes, nearest, now = ir.Constant(_I16, -1), _I32(8), _I32(4)
        nothing = ir.Constant(_VF, ir.Undefined)
        whole = call(b, "llvm.x86.avx512.mask.rndscale.ps.512", _VF, [x, nearest, nothing, all_lanes, now])
        p = _power(b, b.fsub(x, whole))
        return call(b, "llvm.x86.avx512.mask.scalef.ps.512", _VF, [p, whole, nothing, all_lanes, now])
    t = b.select(b.fcmp_ordered("<", x, _floats(-126.0)), _floats(-126.0), x)
    t = b.select(b.fcmp_ordered(">", t, _floats(128.0)), _floats(128.0), t)
    shifted = b.fadd(t, _floats(_ROUND))
    p = _power(b, b.fsub(t, b.fsub(shifted, _floats(_ROUND))))
    power = b.shl(b.add(b.bitcast(shifted, _VI), _ints(127)), _ints(23))
    return b.fmul(p, b.bitcast(power, _VF))


def _power(b: Any, f: Any) -> Any:
    p = _floats(_EXP2[0])
    for coefficient in _EXP2[1:]:
        p = call(b, f"llvm.fma.v{LANES}f32", _VF, [p, f, _floats(coefficient)])
    return p


def emit_reciprocal(b: Any, x: Any) -> Any:
    """Code for 1/x of a vector of normal numbers below 2^126, to the last bit or its neighbour."""
    if not AVX512:
        return b.fdiv(_floats(1.0), x)
    all_lanes, nothing = ir.Constant(_I16, -1), ir.Constant(_VF, ir.Undefined)
    guess = call(b, "llvm.x86.avx512.rcp14.ps.512", _VF, [x, nothing, all_lanes])
    # a Newton step doubles the 14 bits; a division would take as long as sixteen products
    wrong = call(b, f"llvm.fma.v{LANES}f32", _VF, [b.fsub(_floats(-0.0), x), guess, _floats(1.0)])
    return call(b, f"llvm.fma.v{LANES}f32", _VF, [guess, wrong, guess])


def emit_sigmoid(b: Any, x: Any) -> Any:
    """Code for 1 / (1 + e^-x) of a vector; 0 below 2^-127, so that a huge x times it is 0 too."""
    power = b.fmul(x, _floats(-1.4426950408889634))
    far = b.fcmp_ordered(">", power, _floats(127.0))
    total = b.fadd(_floats(1.0), emit_exp2(b, b.select(far, _floats(0.0), power)))
    quarter = _floats(0.25)  # a factor on both sides keeps the reciprocal a normal number
    inverse = b.fmul(emit_reciprocal(b, b.fmul(total, quarter)), quarter)
    return b.select(far, _floats(0.0), inverse)


@intrinsic
def exp2(typing: Any, x: Any) -> Any:
    """2^x of a vector."""
    return VEC(x), lambda context, b, sig, args: emit_exp2(b, args[0])


@intrinsic
def sigmoid(typing: Any, x: Any) -> Any:
    """1 / (1 + e^-x) of a vector."""
    return VEC(x), lambda context, b, sig, args: emit_sigmoid(b, args[0])
