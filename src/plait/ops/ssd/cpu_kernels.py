"""Numba kernels of Mamba-2's recurrence: forward, and a gradient written by hand.

    S_t = g_t S_{t-1} + x_t (d_t B_t)^T,   y_t = S_t C_t + D x_t,   g_t = exp(d_t A)        (arXiv 2405.21060)
    d the step after bias, softplus and limits (dt); dS the gradient of S

A task is one sequence and one or more heads of a group; time runs in blocks of Q tokens. A block's operands are
copied to padded float32 buffers, and a tile of the state, `rows` head channels by some vectors of 16 lanes along N,
stays in registers over the block's tokens. Tasks write to places of their own and add in a fixed order, so results
do not depend on how many threads share the tasks.

Backward takes the blocks last to first. For each tile it repeats the block's steps from the state that entered the
block (saved by forward), keeps g_t S_{t-1} of every step, and then walks back with dS. The decay's gradient is the
inner product of dS_t and g_t S_{t-1} itself: nothing cancels, however strong the decay.

Everything that the kernels use stands in this file: Numba's cache does not see changes elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)


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


def _load(builder: Any, address: Any, vector: Any) -> Any:
    value = builder.load(builder.bitcast(address, vector.as_pointer()))
    value.align = 4
    return value


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = 4


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


def _unpack(builder: Any, tile: Any) -> list[Any]:
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


def _pack(builder: Any, vectors: list[Any]) -> Any:
    tile = ir.Constant(ir.ArrayType(_VECTOR, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        tile = builder.insert_value(tile, vector, i)
    return tile


def _scalars(context: Any, builder: Any, kind: Any, array: Any, index: Any, count: int) -> list[Any]:
    """array[index : index + count], each in all lanes."""
    base = _at(context, builder, kind, array, index)
    return [_splat(builder, builder.load(builder.gep(base, [ir.Constant(_INT, i)]))) for i in range(count)]


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
        return _pack(builder, vectors)

    return kind(shape, array, types.intp, types.intp), generate


@intrinsic
def tile_store(typing: Any, array: Any, index: Any, stride: Any, tile: Any) -> Any:
    """Write a tile, row r to array[index + r * stride]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors, start = iter(_unpack(builder, args[3])), args[1]
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
        return _pack(builder, [_load(builder, place, _VECTOR) for place in places])

    return kind(shape, array, types.intp), generate


@intrinsic
def tile_scale(typing: Any, factor: Any, tile: Any) -> Any:
    """factor * tile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _splat(builder, args[0])
        return _pack(builder, [builder.fmul(lanes, v) for v in _unpack(builder, args[1])])

    return tile(types.float32, tile), generate


@intrinsic
def tile_outer(typing: Any, tile: Any, array: Any, index: Any, row: Any) -> Any:
    """tile_r + array[index + r] * row, for every row r."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors, across = _unpack(builder, args[0]), _unpack(builder, args[3])
        factors = _scalars(context, builder, signature.args[1], args[1], args[2], tile.rows)
        for i, vector in enumerate(vectors):
            vectors[i] = _fma(builder, factors[i // tile.vectors], across[i % tile.vectors], vector)
        return _pack(builder, vectors)

    return tile(tile, array, types.intp, row), generate


@intrinsic
def tile_mix(typing: Any, row: Any, array: Any, index: Any, tile: Any) -> Any:
    """row + the sum over rows r of array[index + r] * tile_r."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, vectors = _unpack(builder, args[0]), _unpack(builder, args[3])
        factors = _scalars(context, builder, signature.args[1], args[1], args[2], tile.rows)
        for i, vector in enumerate(vectors):
            v = i % tile.vectors
            total[v] = _fma(builder, factors[i // tile.vectors], vector, total[v])
        return _pack(builder, total)

    return row(row, array, types.intp, tile), generate


@intrinsic
def tile_dots(typing: Any, array: Any, index: Any, tile: Any, row: Any) -> Any:
    """array[index + r] += the inner product of tile_r and row, for every row r (a power of two of them)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def shuffle(a: Any, b: Any, places: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(places)), places))

        vectors, across = _unpack(builder, args[2]), _unpack(builder, args[3])
        sums = []
        for r in range(tile.rows):
            total = builder.fmul(vectors[r * tile.vectors], across[0])
            for v in range(1, tile.vectors):
                total = _fma(builder, vectors[r * tile.vectors + v], across[v], total)
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
        while count > tile.rows:
            count //= 2
            low, high = list(range(count)), list(range(count, 2 * count))
            total = builder.fadd(shuffle(total, total, low), shuffle(total, total, high))
        address = _at(context, builder, signature.args[0], args[0], args[1])
        _store(builder, builder.fadd(_load(builder, address, total.type), total), address)
        return context.get_dummy_value()

    return types.void(array, types.intp, tile, row), generate


@intrinsic
def tile_inner(typing: Any, array: Any, index: Any, a: Any, b: Any) -> Any:
    """array[index : index + LANES] += the inner product of two tiles, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right = _unpack(builder, args[2]), _unpack(builder, args[3])
        chains = [builder.fmul(x, y) for x, y in zip(left[:2], right[:2], strict=True)]
        for i in range(2, len(left)):
            chains[i % 2] = _fma(builder, left[i], right[i], chains[i % 2])
        total = chains[0] if len(chains) == 1 else builder.fadd(*chains)
        address = _at(context, builder, signature.args[0], args[0], args[1])
        _store(builder, builder.fadd(_load(builder, address, _VECTOR), total), address)
        return context.get_dummy_value()

    return types.void(array, types.intp, a, b), generate


@intrinsic
def get(typing: Any, array: Any, index: Any) -> Any:
    """array[index] as float32; uint16 elements are bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_at(context, builder, signature.args[0], args[0], args[1]))
        if array.dtype == types.float32:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _INT), ir.Constant(_INT, 16)), _FLOAT)

    return types.float32(array, types.intp), generate


@intrinsic
def put(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, a float32; into uint16 elements as bfloat16, rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, value = _at(context, builder, signature.args[0], args[0], args[1]), args[2]
        if array.dtype != types.float32:
            bits = builder.bitcast(value, _INT)
            sixteen = ir.Constant(_INT, 16)
            odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(_INT, 1))
            rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(_INT, 0x7FFF)), odd), sixteen)
            nan = builder.fcmp_unordered("uno", value, value)
            value = builder.trunc(builder.select(nan, ir.Constant(_INT, 0x7FC0), rounded), ir.IntType(16))
        builder.store(value, address)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@njit(**OPTIONS)
def _read(into: Any, at: int, array: Any, start: int, count: int, factor: Any) -> None:
    for i in range(count):
        put(into, at + i, factor * get(array, start + i))


@njit(**OPTIONS)
def _up(count: int, step: int) -> int:
    return (count + step - 1) // step * step


@njit(**OPTIONS)
def _task_heads(part: int, heads: int, groups: int, share: int) -> tuple[int, int, int]:
    """The group of a task, its first head and the one after its last."""
    per_group = heads // groups
    parts = (per_group + share - 1) // share
    group = part // parts
    head = group * per_group + part % parts * share
    return group, head, min(head + share, (group + 1) * per_group)


@njit(**OPTIONS)
def forward(
    first, last, shape, sizes, segments, x, x_step, dt, dt_step, b, b_step, c, c_step,
    decay, bias, skip, initial, low, high, softplus, y, final, steps, gates, states,
):  # fmt: skip
    """Tasks first to last - 1. Arrays are flat; *_step are (row, token, head or group) strides of the inputs.

    sizes (T, H, P, G, N, heads a task, Q, tasks a sequence); segments (4, S): row, first token, length, number of
    the first saved state; steps, gates (tokens, H): d before its limits and exp(d A); states: S entering each block
    but a sequence's first, padded; empty when nothing is to be saved.
    """
    length, heads, width, groups, size, share, block, parts = sizes
    rows, lanes = len(shape), LANES * len(shape[0])
    wide, deep, long = _up(width, LANES), _up(width, rows), _up(size, lanes)
    one = np.float32(1)
    state = np.zeros(deep * long, np.float32)
    xs, ys = np.zeros(block * wide, np.float32), np.zeros(block * wide, np.float32)
    bs, cs = np.zeros(block * long, np.float32), np.zeros(block * long, np.float32)
    ds, gs = np.zeros(block, np.float32), np.zeros(block, np.float32)
    for task in range(first, last):
        segment = task // parts
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = _task_heads(task % parts, heads, groups, share)
        for head in range(head_begin, head_end):
            outer = (segment * heads + head) * width * size
            for p in range(width):
                for n in range(size):
                    start = get(initial, outer + p * size + n) if initial.size > 0 else np.float32(0)
                    put(state, p * long + n, start)
            for t0 in range(0, count, block):
                many = min(block, count - t0)
                if states.size > 0 and t0 > 0:
                    saved = ((number + t0 // block - 1) * heads + head) * deep * long
                    _read(states, saved, state, 0, deep * long, one)
                for t in range(many):
                    token = begin + t0 + t
                    d = dt[row * dt_step[0] + token * dt_step[1] + head * dt_step[2]] + bias[head]
                    if softplus and d <= np.float32(20):
                        d = np.float32(math.log1p(math.exp(d)))
                    at = (row * length + token) * heads + head
                    steps[at] = d
                    d = low if d < low else d
                    ds[t] = high if d > high else d
                    gs[t] = np.float32(math.exp(ds[t] * decay[head]))
                    gates[at] = gs[t]
                    source = row * x_step[0] + token * x_step[1] + head * x_step[2]
                    _read(xs, t * wide, x, source, width, one)
                    source = row * b_step[0] + token * b_step[1] + group * b_step[2]
                    _read(bs, t * long, b, source, size, ds[t])
                    source = row * c_step[0] + token * c_step[1] + group * c_step[2]
                    _read(cs, t * long, c, source, size, one)
                ys[: many * wide] = np.float32(0)
                for n in range(0, long, lanes):
                    for p in range(0, deep, rows):
                        tile = tile_load(shape, state, p * long + n, long)
                        for t in range(many):
                            key, query = row_load(shape, bs, t * long + n), row_load(shape, cs, t * long + n)
                            tile = tile_outer(tile_scale(gs[t], tile), xs, t * wide + p, key)
                            tile_dots(ys, t * wide + p, tile, query)
                        tile_store(state, p * long + n, long, tile)
                for t in range(many):
                    target = ((row * length + begin + t0 + t) * heads + head) * width
                    for p in range(width):
                        through = get(skip, head * width + p) * get(xs, t * wide + p)
                        put(y, target + p, get(ys, t * wide + p) + through)
            for p in range(width):
                _read(final, outer + p * size, state, p * long, size, one)


@njit(**OPTIONS)
def backward(
    first, last, shape, sizes, segments, x, x_step, dy, dy_step, b, b_step, c, c_step,
    decay, skip, initial, dfinal, low, high, softplus, steps, gates, states,
    dx, ddt, db, dc, dinitial, sums,
):  # fmt: skip
    """The gradient, tasks first to last - 1; see `forward`.

    db, dc (parts of a group, tokens, G, N): one summand for each task of the same group; sums (S, H, P + 2) float64:
    of each sequence the gradient of D, of A and of dt_bias.
    """
    length, heads, width, groups, size, share, block, parts = sizes
    rows, lanes = len(shape), LANES * len(shape[0])
    wide, deep, long = _up(width, LANES), _up(width, rows), _up(size, lanes)
    one = np.float32(1)
    area, tile_area = deep * long, rows * lanes
    tokens = db.size // max(parts // groups * groups * size, 1)
    dstate, enter = np.zeros(share * area, np.float32), np.zeros(area, np.float32)
    kept = np.zeros(block * tile_area, np.float32)
    xs, dys, dxs = (
        np.zeros(block * wide, np.float32), np.zeros(block * wide, np.float32), np.zeros(block * wide, np.float32)
    )  # fmt: skip
    raw, bs, cs = (
        np.zeros(block * long, np.float32), np.zeros(block * long, np.float32), np.zeros(block * long, np.float32)
    )  # fmt: skip
    dbs, db_sum, dc_sum = (
        np.zeros(block * long, np.float32), np.zeros(block * long, np.float32), np.zeros(block * long, np.float32)
    )  # fmt: skip
    ds, gs, das = np.zeros(block, np.float32), np.zeros(block, np.float32), np.zeros(block * LANES, np.float32)
    dskip = np.zeros(wide, np.float32)
    for task in range(first, last):
        segment = task // parts
        row, begin, count, number = segments[:, segment]
        group, head_begin, head_end = _task_heads(task % parts, heads, groups, share)
        part = task % parts % (parts // groups)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            for p in range(width):
                for n in range(size):
                    end = get(dfinal, outer + p * size + n) if dfinal.size > 0 else np.float32(0)
                    put(dstate, base + p * long + n, end)
            sums[(segment * heads + head) * (width + 2) : (segment * heads + head + 1) * (width + 2)] = 0.0
        for k in range((count + block - 1) // block - 1, -1, -1):
            t0 = k * block
            many = min(block, count - t0)
            db_sum[: many * long] = np.float32(0)
            dc_sum[: many * long] = np.float32(0)
            for t in range(many):
                token = begin + t0 + t
                _read(raw, t * long, b, row * b_step[0] + token * b_step[1] + group * b_step[2], size, one)
                _read(cs, t * long, c, row * c_step[0] + token * c_step[1] + group * c_step[2], size, one)
            for head in range(head_begin, head_end):
                outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
                if k > 0:
                    _read(enter, 0, states, ((number + k - 1) * heads + head) * area, area, one)
                else:
                    for p in range(width):
                        for n in range(size):
                            start = get(initial, outer + p * size + n) if initial.size > 0 else np.float32(0)
                            put(enter, p * long + n, start)
                for t in range(many):
                    token = begin + t0 + t
                    at = (row * length + token) * heads + head
                    gs[t] = gates[at]
                    d = steps[at]
                    d = low if d < low else d
                    ds[t] = high if d > high else d
                    _read(bs, t * long, raw, t * long, size, ds[t])
                    source = row * x_step[0] + token * x_step[1] + head * x_step[2]
                    _read(xs, t * wide, x, source, width, one)
                    source = row * dy_step[0] + token * dy_step[1] + head * dy_step[2]
                    _read(dys, t * wide, dy, source, width, one)
                dxs[: many * wide] = np.float32(0)
                dbs[: many * long] = np.float32(0)
                das[: many * LANES] = np.float32(0)
                for n in range(0, long, lanes):
                    for p in range(0, deep, rows):
                        tile = tile_load(shape, enter, p * long + n, long)
                        for t in range(many):
                            tile = tile_scale(gs[t], tile)
                            tile_store(kept, t * tile_area, lanes, tile)
                            tile = tile_outer(tile, xs, t * wide + p, row_load(shape, bs, t * long + n))
                            total = row_load(shape, dc_sum, t * long + n)
                            tile_store(dc_sum, t * long + n, 0, tile_mix(total, dys, t * wide + p, tile))
                        tile = tile_load(shape, dstate, base + p * long + n, long)
                        for t in range(many - 1, -1, -1):
                            tile = tile_outer(tile, dys, t * wide + p, row_load(shape, cs, t * long + n))
                            total = row_load(shape, dbs, t * long + n)
                            tile_store(dbs, t * long + n, 0, tile_mix(total, xs, t * wide + p, tile))
                            tile_dots(dxs, t * wide + p, tile, row_load(shape, bs, t * long + n))
                            tile_inner(das, t * LANES, tile, tile_load(shape, kept, t * tile_area, lanes))
                            tile = tile_scale(gs[t], tile)
                        tile_store(dstate, base + p * long + n, long, tile)
                # from here on one token costs P + N
                dskip[:] = np.float32(0)
                dA = dbias = 0.0
                for t in range(many):
                    token = row * length + begin + t0 + t
                    at = token * heads + head
                    da = dd = np.float32(0)
                    for lane in range(LANES):
                        da += get(das, t * LANES + lane)
                    for n in range(long):
                        dd += get(raw, t * long + n) * get(dbs, t * long + n)
                    for n in range(long):
                        total = get(db_sum, t * long + n) + ds[t] * get(dbs, t * long + n)
                        put(db_sum, t * long + n, total)
                    for p in range(wide):
                        put(dskip, p, get(dskip, p) + get(dys, t * wide + p) * get(xs, t * wide + p))
                    for p in range(width):
                        through = get(skip, head * width + p) * get(dys, t * wide + p)
                        put(dx, at * width + p, get(dxs, t * wide + p) + through)
                    dA += np.float64(da) * ds[t]
                    dd += da * decay[head]
                    d = steps[at]
                    if d < low or d > high:
                        dd = np.float32(0)
                    if softplus:
                        dd *= np.float32(-math.expm1(-d))
                    ddt[at] = dd
                    dbias += dd
                base = (segment * heads + head) * (width + 2)
                for p in range(width):
                    sums[base + p] += dskip[p]
                sums[base + width] += dA
                sums[base + width + 1] += dbias
            for t in range(many):
                token = row * length + begin + t0 + t
                target = ((part * tokens + token) * groups + group) * size
                _read(db, target, db_sum, t * long, size, one)
                _read(dc, target, dc_sum, t * long, size, one)
        for head in range(head_begin, head_end):
            outer, base = (segment * heads + head) * width * size, (head - head_begin) * area
            for p in range(width):
                _read(dinitial, outer + p * size, dstate, base + p * long, size, one)
