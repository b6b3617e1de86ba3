"""Register tiles for Numba: the intrinsics under the CPU kernels of sequence ops.

A tile is some rows of some vectors of LANES float32 lanes, one value of the compiled code. Memory is a flat array of
float32, or of uint16 that holds bfloat16. No index is checked or counted from the end.

Numba's cache of a kernel does not see changes here: the stamps in the kernels' files (and a test of them) are for that.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np import arrayobj

from plait.ops.numba_support import LANES, splat

_FLOAT, _INT, _SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_VECTOR, _BITS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


class Tile(types.Type):
    """`rows` rows of `vectors` vectors of LANES float32 lanes, kept in registers."""

    def __init__(self, rows: int, vectors: int) -> None:
        self.rows, self.vectors = rows, vectors
        super().__init__(name=f"Tile({rows}, {vectors})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Tile) -> None:
        super().__init__(manager, kind, ir.ArrayType(_VECTOR, kind.rows * kind.vectors))


# The intrinsics below take `shape`, nested tuples of zeros: its type says how many rows and vectors a tile has.


def _at(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Address of array[index], without Python's meaning of a negative index (it would hinder vector loads)."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(builder: Any, address: Any, vector: Any, float32: bool = True) -> Any:
    value = builder.load(builder.bitcast(address, vector.as_pointer()))
    value.align = 4 if float32 else 2
    return value


def _store(builder: Any, value: Any, address: Any, float32: bool = True) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = 4 if float32 else 2


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


def tile_unpack(builder: Any, tile: Any) -> list[Any]:
    """The vectors of a tile, row by row."""
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


def tile_pack(builder: Any, vectors: list[Any]) -> Any:
    """The tile of these vectors."""
    tile = ir.Constant(ir.ArrayType(_VECTOR, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        tile = builder.insert_value(tile, vector, i)
    return tile


def _scalars(
    context: Any, builder: Any, kind: Any, array: Any, index: Any, stride: Any, count: int
) -> list[Any]:
    """array[index + i * stride] for i < count, each in all lanes."""
    steps = [builder.mul(ir.Constant(stride.type, i), stride) for i in range(count)]
    places = [_at(context, builder, kind, array, builder.add(index, step)) for step in steps]
    return [splat(builder, builder.load(place)) for place in places]


@intrinsic
def tile_load(typing: Any, shape: Any, array: Any, index: Any, stride: Any) -> Any:
    """A tile whose row r begins at array[index + r * stride]."""
    kind = Tile(len(shape), len(shape[0]))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors, start = [], args[2]
        for _ in range(kind.rows):
            base = _at(context, builder, signature.args[1], args[1], start)
            for v in range(kind.vectors):
                vectors.append(_load(builder, builder.gep(base, [ir.Constant(_INT, v * LANES)]), _VECTOR))
            start = builder.add(start, args[3])
        return tile_pack(builder, vectors)

    return kind(shape, array, types.intp, types.intp), generate


@intrinsic
def tile_store(typing: Any, array: Any, index: Any, stride: Any, tile: Any) -> Any:
    """Write a tile, row r to array[index + r * stride]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors, start = iter(tile_unpack(builder, args[3])), args[1]
        for _ in range(tile.rows):
            base = _at(context, builder, signature.args[0], args[0], start)
            for v in range(tile.vectors):
                _store(builder, next(vectors), builder.gep(base, [ir.Constant(_INT, v * LANES)]))
            start = builder.add(start, args[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, tile), generate


@intrinsic
def row_load(typing: Any, shape: Any, array: Any, index: Any) -> Any:
    """One row of a tile, from array[index]."""
    kind = Tile(1, len(shape[0]))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _at(context, builder, signature.args[1], args[1], args[2])
        places = [builder.gep(base, [ir.Constant(_INT, v * LANES)]) for v in range(kind.vectors)]
        return tile_pack(builder, [_load(builder, place, _VECTOR) for place in places])

    return kind(shape, array, types.intp), generate


@intrinsic
def tile_scale(typing: Any, factor: Any, tile: Any) -> Any:
    """factor * tile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = splat(builder, args[0])
        return tile_pack(builder, [builder.fmul(lanes, v) for v in tile_unpack(builder, args[1])])

    return tile(types.float32, tile), generate


@intrinsic
def tile_outer(typing: Any, tile: Any, array: Any, index: Any, stride: Any, row: Any) -> Any:
    """tile_r + array[index + r * stride] * row, for every row r."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors, across = tile_unpack(builder, args[0]), tile_unpack(builder, args[4])
        factors = _scalars(context, builder, signature.args[1], args[1], args[2], args[3], tile.rows)
        for i, vector in enumerate(vectors):
            vectors[i] = _fma(builder, factors[i // tile.vectors], across[i % tile.vectors], vector)
        return tile_pack(builder, vectors)

    return tile(tile, array, types.intp, types.intp, row), generate


@intrinsic
def tile_turn(typing: Any, tile: Any) -> Any:
    """The transposed tile, of LANES rows of one vector."""
    assert (tile.rows, tile.vectors) == (LANES, 1), tile

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = tile_unpack(builder, args[0])
        half = LANES // 2
        while half:  # change places: the lanes that have this bit, of rows that have not, for the reverse
            low = [j if not j & half else LANES + j - half for j in range(LANES)]
            high = [j + half if not j & half else LANES + j for j in range(LANES)]
            turned = list(rows)
            for r in range(LANES):
                if not r & half:
                    for to, places in ((r, low), (r + half, high)):
                        mask = ir.Constant(ir.VectorType(_INT, LANES), places)
                        turned[to] = builder.shuffle_vector(rows[r], rows[r + half], mask)
            rows = turned
            half //= 2
        return tile_pack(builder, rows)

    return tile(tile), generate


def _add_inner(context: Any, builder: Any, kind: Any, array: Any, index: Any, rows: list[list[Any]]) -> None:
    """array[index + r] += the sum over the lanes of the products of the pairs of vectors in rows[r]."""

    def shuffle(a: Any, b: Any, places: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(places)), places))

    sums = []
    for pairs in rows:
        total = builder.fmul(*pairs[0])
        for left, right in pairs[1:]:
            total = _fma(builder, left, right, total)
        sums.append(total)
    # two rows at a time into one vector: lane j keeps the row that its low bits name
    bit = 1
    while len(sums) > 1:
        own = [j + LANES if j & bit else j for j in range(LANES)]
        other = [place ^ bit for place in own]
        sums = [
            builder.fadd(shuffle(a, b, own), shuffle(a, b, other))
            for a, b in zip(sums[::2], sums[1::2], strict=True)
        ]
        bit *= 2
    total, count = sums[0], LANES
    while count > len(rows):
        count //= 2
        low, high = list(range(count)), list(range(count, 2 * count))
        total = builder.fadd(shuffle(total, total, low), shuffle(total, total, high))
    address = _at(context, builder, kind, array, index)
    _store(builder, builder.fadd(_load(builder, address, total.type), total), address)


@intrinsic
def tile_dots(typing: Any, array: Any, index: Any, tile: Any, row: Any) -> Any:
    """array[index + r] += the inner product of tile_r and row, for every row r (a power of two of them)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors, across = tile_unpack(builder, args[2]), tile_unpack(builder, args[3])
        pairs = [(vector, across[i % tile.vectors]) for i, vector in enumerate(vectors)]
        rows = [pairs[i : i + tile.vectors] for i in range(0, len(pairs), tile.vectors)]
        _add_inner(context, builder, signature.args[0], args[0], args[1], rows)
        return context.get_dummy_value()

    return types.void(array, types.intp, tile, row), generate


@intrinsic
def tile_inner(typing: Any, array: Any, index: Any, left: Any, right: Any) -> Any:
    """array[index + r] += the inner product of row r of both tiles, for every row r (a power of two of them)."""
    assert left == right, (left, right)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs = list(zip(tile_unpack(builder, args[2]), tile_unpack(builder, args[3]), strict=True))
        rows = [pairs[i : i + left.vectors] for i in range(0, len(pairs), left.vectors)]
        _add_inner(context, builder, signature.args[0], args[0], args[1], rows)
        return context.get_dummy_value()

    return types.void(array, types.intp, left, right), generate


def _widen(builder: Any, value: Any, float32: bool) -> Any:
    """float32 of loaded elements, a scalar or a vector; those that are not float32 are bfloat16 in 16-bit integers."""
    if float32:
        return value
    bits, kind = (_INT, _FLOAT) if isinstance(value.type, ir.IntType) else (_BITS, _VECTOR)
    shift = ir.Constant(_INT, 16) if bits is _INT else ir.Constant(_BITS, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(value, bits), shift), kind)


def _narrow(builder: Any, value: Any, float32: bool) -> Any:
    """What to store for a float32: itself, or bfloat16 rounded to nearest even."""
    if float32:
        return value
    scalar = isinstance(value.type, ir.FloatType)
    bits, short = (_INT, _SHORT) if scalar else (_BITS, ir.VectorType(_SHORT, LANES))

    def number(n: int) -> Any:
        return ir.Constant(bits, n if scalar else [n] * LANES)

    raw = builder.bitcast(value, bits)
    odd = builder.and_(builder.lshr(raw, number(16)), number(1))
    rounded = builder.lshr(builder.add(builder.add(raw, number(0x7FFF)), odd), number(16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, number(0x7FC0), rounded), short)


@intrinsic
def copy(typing: Any, into: Any, at: Any, array: Any, start: Any, count: Any, factor: Any) -> Any:
    """into[at + i] = factor * array[start + i] for i < count; either side is float32 or bfloat16 (as uint16)."""
    kinds = into.dtype == types.float32, array.dtype == types.float32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = _at(context, builder, signature.args[0], args[0], args[1])
        source = _at(context, builder, signature.args[2], args[2], args[3])
        count, lanes = args[4], splat(builder, args[5])
        wide_in = ir.VectorType(source.type.pointee, LANES)
        one, many = ir.Constant(count.type, 1), ir.Constant(count.type, LANES)
        whole = builder.and_(count, ir.Constant(count.type, -LANES))
        with cgutils.for_range_slice(builder, ir.Constant(count.type, 0), whole, many, inc=True) as (i, _):
            value = _load(builder, builder.gep(source, [i]), wide_in, kinds[1])
            value = builder.fmul(lanes, _widen(builder, value, kinds[1]))
            _store(builder, _narrow(builder, value, kinds[0]), builder.gep(target, [i]), kinds[0])
        with cgutils.for_range_slice(builder, whole, count, one, inc=True) as (i, _):
            value = builder.fmul(args[5], _widen(builder, builder.load(builder.gep(source, [i])), kinds[1]))
            builder.store(_narrow(builder, value, kinds[0]), builder.gep(target, [i]))
        return context.get_dummy_value()

    return types.void(into, types.intp, array, types.intp, types.intp, types.float32), generate


@intrinsic
def lane_sum(typing: Any, array: Any, index: Any) -> Any:
    """The sum of array[index : index + LANES], by halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = _load(builder, _at(context, builder, signature.args[0], args[0], args[1]), _VECTOR)
        count = LANES
        while count > 1:
            count //= 2
            halves = (list(range(count)), list(range(count, 2 * count)))
            places = [ir.Constant(ir.VectorType(_INT, count), half) for half in halves]
            total = builder.fadd(*(builder.shuffle_vector(total, total, place) for place in places))
        return builder.extract_element(total, ir.Constant(_INT, 0))

    return types.float32(array, types.intp), generate


@intrinsic
def prefetch(typing: Any, array: Any, index: Any, count: Any) -> Any:
    """Ask for the cache lines of array[index : index + count]; any index will do."""
    line = 64 // (array.dtype.bitwidth // 8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _at(context, builder, signature.args[0], args[0], args[1])
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        zero, step = ir.Constant(args[2].type, 0), ir.Constant(args[2].type, line)
        with cgutils.for_range_slice(builder, zero, args[2], step, inc=True) as (i, _):
            address = builder.bitcast(builder.gep(base, [i]), byte)
            builder.call(function, [address, *(ir.Constant(_INT, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


def _borrowed(context: Any, builder: Any, kind: Any, data: Any, count: Any) -> Any:
    """Code for `count` elements from `data` on, as an array that nobody counts the users of."""
    array = arrayobj.make_array(kind)(context, builder)
    size = context.get_constant(types.intp, kind.dtype.bitwidth // 8)
    arrayobj.populate_array(array, data, [count], [size], size, meminfo=None)
    return array._getvalue()


@intrinsic
def borrow(typing: Any, *arrays: Any) -> Any:
    """The flat arrays themselves, whose users are not counted any more; their owner must outlive them.

    Counting is a locked instruction, for which the processor waits, wherever an array is handed on.
    """
    kinds: Any = arrays[0] if len(arrays) == 1 and isinstance(arrays[0], types.BaseTuple) else arrays
    of = types.Tuple(tuple(kinds))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = []
        for i, kind in enumerate(of):
            array = context.make_array(kind)(context, builder, builder.extract_value(args[0], i))
            made.append(_borrowed(context, builder, kind, array.data, array.nitems))
        return context.make_tuple(builder, of, made)

    return of(types.StarArgTuple(tuple(kinds))), generate


@intrinsic
def parts(typing: Any, array: Any, counts: Any) -> Any:
    """Arrays of so many elements each, side by side in `array`, which must outlive them; see `borrow`."""
    of = types.UniTuple(array, len(counts))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, made = context.make_array(array)(context, builder, args[0]).data, []
        for i in range(len(counts)):
            count = builder.extract_value(args[1], i)
            made.append(_borrowed(context, builder, array, data, count))
            data = builder.gep(data, [count])
        return context.make_tuple(builder, of, made)

    return of(array, counts), generate
