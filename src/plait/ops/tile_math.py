"""Arithmetic of register tiles: operators that broadcast, exponentials, reciprocals, and a loop over rows.

`+ - * /` between tiles, rows (tiles of one row) and float32 numbers work element by element; a row meets every row of
a tile, and a product that is added becomes one fused multiply-add. `rowwise` evaluates an ordinary jitted function
row after row, so that what it computes of one row need not wait in registers for the others.

Numba's cache of a kernel does not see changes here: the stamps in the kernels' files (and a test of them) are for that.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin

from plait.ops.numba_support import (
    MASK,
    emit_exp2,
    emit_load,
    emit_reciprocal,
    emit_sigmoid,
    emit_store,
    splat,
)
from plait.ops.tiles import LANES, Tile, tile_pack, tile_unpack

ROW = Tile(1, 1)
_F32, _I32 = ir.FloatType(), ir.IntType(32)
_VF = ir.VectorType(_F32, LANES)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_VF, [float(np.float32(value))] * LANES)


def _result(*kinds: Any) -> Any:
    """The tile that an operation on these gives: that with the most rows."""
    return max((k for k in kinds if isinstance(k, Tile)), key=lambda k: k.rows)


def _vector(builder: Any, value: Any, kind: Any, i: int) -> Any:
    """Vector i of an operand; a row and a number are the same in every row."""
    if not isinstance(kind, Tile):
        return splat(builder, value)
    return builder.extract_value(value, i if kind.rows > 1 else i % kind.vectors)


def _each(builder: Any, sig: Any, args: Any, function: Any) -> Any:
    kind = sig.return_type
    operands = list(zip(args, sig.args, strict=True))
    vectors = [
        function(*(_vector(builder, value, of, i) for value, of in operands))
        for i in range(kind.rows * kind.vectors)
    ]
    return tile_pack(builder, vectors)


def _define_operator(op: Any, instruction: str) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != 2 or not any(isinstance(a, Tile) for a in args):
                return None
            if not all(isinstance(a, (Tile, types.Float)) for a in args):
                return None
            return signature(_result(*args), *(a if isinstance(a, Tile) else types.float32 for a in args))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _each(
            builder, sig, args, lambda x, y: getattr(builder, instruction)(x, y, flags=("contract",))
        )

    for first, second in ((Tile, Tile), (Tile, types.Float), (types.Float, Tile)):
        lower_builtin(op, first, second)(lower)


for _op, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_op, _instruction)


@intrinsic
def tile_exp2(typing: Any, x: Any) -> Any:
    """2^x of every element."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _each(builder, sig, args, lambda v: emit_exp2(builder, v))

    return x(x), lower


@intrinsic
def tile_reciprocal(typing: Any, x: Any) -> Any:
    """1/x of every element, normal and below 2^126."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _each(builder, sig, args, lambda v: emit_reciprocal(builder, v))

    return x(x), lower


@intrinsic
def tile_sigmoid(typing: Any, x: Any) -> Any:
    """1 / (1 + e^-x) of every element."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _each(builder, sig, args, lambda v: emit_sigmoid(builder, v))

    return x(x), lower


@intrinsic
def tile_clip(typing: Any, x: Any, low: Any, high: Any) -> Any:
    """Every element brought between two numbers; NaN stays NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def one(v: Any, least: Any, most: Any) -> Any:
            v = builder.select(builder.fcmp_ordered("<", v, least), least, v)
            return builder.select(builder.fcmp_ordered(">", v, most), most, v)

        return _each(builder, sig, args, one)

    return x(x, types.float32, types.float32), lower


@intrinsic
def tile_flush(typing: Any, x: Any, least: Any) -> Any:
    """Every element, or 0 where it is below `least`; NaN stays NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def one(v: Any, bound: Any) -> Any:
            return builder.select(builder.fcmp_ordered("<", v, bound), _floats(0.0), v)

        return _each(builder, sig, args, one)

    return x(x, types.float32), lower


@intrinsic
def tile_column(typing: Any, shape: Any, array: Any, index: Any) -> Any:
    """A tile with array[index + r] in all of row r."""
    kind = Tile(len(shape), len(shape[0]))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        base = builder.gep(context.make_array(sig.args[1])(context, builder, args[1]).data, [args[2]])
        rows = [splat(builder, builder.load(builder.gep(base, [_I32(r)]))) for r in range(kind.rows)]
        return tile_pack(builder, [row for row in rows for _ in range(kind.vectors)])

    return kind(shape, array, types.intp), lower


@intrinsic
def tile_zero(typing: Any, shape: Any) -> Any:
    """A tile of zeros."""
    kind = Tile(len(shape), len(shape[0]))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return tile_pack(builder, [_floats(0.0)] * (kind.rows * kind.vectors))

    return kind(shape), lower


@intrinsic
def row_read(typing: Any, array: Any, index: Any, lanes: Any) -> Any:
    """A row from array[index]; lanes: None, or a mask whose lanes that are off give 0. uint16 holds bfloat16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        mask = args[2] if lanes == MASK else None
        return tile_pack(builder, [emit_load(context, builder, array, args[0], args[1], mask)])

    return ROW(array, types.intp, lanes), lower


@intrinsic
def row_write(typing: Any, array: Any, index: Any, row: Any, lanes: Any) -> Any:
    """Write a row to array[index]; lanes that are off are left alone. Into uint16 as bfloat16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector, mask = builder.extract_value(args[2], 0), args[3] if lanes == MASK else None
        return emit_store(context, builder, array, args[0], args[1], vector, mask)

    return types.void(array, types.intp, row, lanes), lower


@intrinsic
def rowwise(typing: Any, function: Any, carry: Any, *args: Any) -> Any:
    """For every row r in order: (*made, carry) = function(r, carry, *row r of args); gives (*tiles of made, carry)."""
    tuple_kind = (
        args[0] if len(args) == 1 and isinstance(args[0], types.BaseTuple) else types.StarArgTuple(args)
    )
    kinds: tuple[Any, ...] = tuple(tuple_kind)  # type: ignore[arg-type]
    tile = _result(*kinds)
    one = Tile(1, tile.vectors)
    of_row = [one if isinstance(k, Tile) else k for k in kinds]
    inner = function.get_call_type(typing, (types.intp, carry, *of_row), {})
    made = len(inner.return_type) - 1
    result = types.Tuple([tile] * made + [carry])

    def lower(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        compiled = context.get_function(function, inner)
        now: Any = values[1]
        columns: list[list[Any]] = [[] for _ in range(made)]
        given = [builder.extract_value(values[2], j) for j in range(len(kinds))]
        for r in range(tile.rows):
            row = [context.get_constant(types.intp, r), now]
            for value, kind in zip(given, kinds, strict=True):
                if isinstance(kind, Tile):
                    every = [_vector(builder, value, kind, r * tile.vectors + v) for v in range(tile.vectors)]
                    row.append(tile_pack(builder, every))
                else:
                    row.append(value)
            done = compiled(builder, row)
            for j in range(made):
                columns[j] += tile_unpack(builder, builder.extract_value(done, j))
            now = builder.extract_value(done, made)
        tiles = [tile_pack(builder, column) for column in columns]
        return context.make_tuple(builder, result, [*tiles, now])

    return signature(result, function, carry, tuple_kind), lower
