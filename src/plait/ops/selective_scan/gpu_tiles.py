"""Pieces of the selective scan's Triton kernels: tiles of time, the functions around the recurrence, where work lies.

A program is one warp, and a lane one channel or two. A tile is [R, 8]: eight tokens of R = 32 or 64 channels, a
channel's all in one thread, so that the recurrence over them is plain arithmetic between the tile's columns. Tokens
are loaded one by one, R neighbouring channels at a time; strides and widths are constants of the compilation, so that
the addresses cost nothing. What waits is the memory: while a program computes a tile it brings the next one into the
first-level cache (`touch`). Scratch memory has states as [N, channels], N padded to a multiple of what a loop handles.

An *item* is what one program walks through: one sequence, or one segment of it. Segments end at multiples of
`segment` tokens of the row. Packed, item s + j is segment j of sequence s: each step from an item to the next enters
a new sequence or a new segment, so no two share a number; some numbers are of empty items. Likewise a *slot*, the
place of what is kept of a tile, is the tile's number plus the item's, because two sequences may share a tile.
"""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def"
# Triton knows no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.triton_support import LOG2E, softplus

TILE = 8
"""Tokens a tile; the functions below have it built in."""


@triton.jit
def unpack(x):
    """[R, 8] -> its columns, 8 x [R]."""
    rows: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, [rows, 4, 2]))
    x04, x26 = tl.split(tl.reshape(even, [rows, 2, 2]))
    x15, x37 = tl.split(tl.reshape(odd, [rows, 2, 2]))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def pack(x):
    """8 x [R] -> [R, 8], the inverse of `unpack`."""
    rows: tl.constexpr = x[0].shape[0]
    even = tl.reshape(tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6])), [rows, 4])
    odd = tl.reshape(tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7])), [rows, 4])
    return tl.reshape(tl.join(even, odd), [rows, 8])


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): a squared inverse square root is cheaper than a division, and as exact."""
    r = tl.rsqrt(1.0 + tl.exp2(-x * LOG2E))
    return r * r


@triton.jit
def step_size(raw, bias, inside, SOFTPLUS: tl.constexpr, EDGE: tl.constexpr):
    """dt [R, 8] of a tile: raw + bias (R), softplus if asked for; zero for tokens that are not `inside` (8)."""
    dt = raw + bias[:, None]
    if SOFTPLUS:
        dt = softplus(dt)
    if EDGE:
        dt = tl.where(inside[None, :], dt, 0.0)
    return dt


@triton.jit
def load_tile(at, t0, stride: tl.constexpr, live, begin, end, EDGE: tl.constexpr):
    """Tokens t0 .. t0+7 in float32, [R, 8]; zeros outside [begin, end) and where a channel is not live.

    at (R): where the channels' token 0 lies.
    """
    at += tl.cast(t0, tl.int64) * stride
    x = ()
    for j in tl.static_range(8):
        real = live
        if EDGE:
            real = real & _within(live, t0 + j, begin, end)
        x = x + (tl.load(at + j * stride, mask=real, other=0.0).to(tl.float32),)
    return pack(x)


@triton.jit
def store_tile(at, x, t0, stride: tl.constexpr, live, begin, end, EDGE: tl.constexpr):
    """Write x [R, 8] where `load_tile` would read it."""
    at += tl.cast(t0, tl.int64) * stride
    columns = unpack(x)
    for j in tl.static_range(8):
        real = live
        if EDGE:
            real = real & _within(live, t0 + j, begin, end)
        tl.store(at + j * stride, columns[j].to(at.dtype.element_ty), mask=real)


@triton.jit
def touch(p, seen, channel, limit, t0, stride: tl.constexpr, begin, end):
    """Bring tokens t0 .. t0+7 into the first-level cache, by a number of every 32 bytes or less (float32: of all).

    p points at the program's first channel. Returns `seen` (R), which the caller must use, so that the load stays.
    """
    r = tl.arange(0, channel.shape[0])
    token = t0 + r % 8
    at = p + (token.to(tl.int64) * stride + r // 8 * 8)
    real = (token >= begin) & (token < end) & (channel - r + r // 8 * 8 < limit)
    return tl.maximum(seen, tl.load(at, mask=real, other=0.0).to(tl.float32))


@triton.jit
def touch_packed(p, seen, PADDED: tl.constexpr, wanted):
    """The same for a tile's packed B and C at p, if `wanted` is positive."""
    r = tl.arange(0, seen.shape[0]) * 8
    return tl.maximum(seen, tl.load(p + r, mask=(r < PADDED * 16) & (r * 0 + wanted > 0), other=0.0))


@triton.jit
def _within(like, t, begin, end):
    # a block of equal numbers: the interpreter knows no `and` of a block and a number
    t = tl.zeros(like.shape, tl.int32) + t
    return (t >= begin) & (t < end)


@triton.jit
def inside_item(t0, begin, end):
    """Which of the tokens t0 .. t0+7 lie in [begin, end)."""
    t = t0 + tl.arange(0, 8)
    return (t >= begin) & (t < end)


@triton.jit
def vector(p, channel, live, GIVEN: tl.constexpr):
    """The channels' numbers at p (channels), float32; zeros if nothing is given."""
    if GIVEN:
        return tl.load(p + channel, mask=live, other=0.0).to(tl.float32)
    return channel * 0.0


@triton.jit
def locate(item, bounds, sequences, length, segment, segments, VARLEN: tl.constexpr):
    """Of an item: its sequence, row, first token and end, and the first and last item of its sequence."""
    if VARLEN:
        # the last sequence whose first item, sequence + begin // segment, is not beyond this one
        sequence = 0
        high = sequences
        while high - sequence > 1:
            middle = (sequence + high) // 2
            if middle + tl.load(bounds + middle).to(tl.int32) // segment <= item:
                sequence = middle
            else:
                high = middle
        begin = tl.load(bounds + sequence).to(tl.int32)
        end = tl.load(bounds + sequence + 1).to(tl.int32)
        first = sequence + begin // segment
        last = sequence + tl.maximum(end - 1, begin) // segment
        low = (item - sequence) * segment
        row = 0
    else:
        sequence = item // segments
        row = sequence
        begin = 0
        end = length
        first = sequence * segments
        last = first + segments - 1
        low = (item - first) * segment
    return sequence, row, tl.maximum(begin, low), tl.minimum(end, low + segment), first, last


@triton.jit
def tiles_of(begin, end):
    """The first tile of an item and the one after its last; none for an empty item."""
    first = begin // 8
    stop = tl.maximum(tl.cdiv(end, 8), first)
    if begin >= end:
        stop = first
    return first, stop


@triton.jit
def follow(h, rate, more_p, sums_p, item, n, channel, live, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """State n of an item's channels, one item on (or back): 2^(A sum dt) h, and what the item itself adds.

    more_p [items, PADDED, CHANNELS], sums_p [items, CHANNELS]: that addition, and the item's sum of dt.
    """
    row = tl.cast(item, tl.int64)
    more = tl.load(more_p + (row * PADDED + n) * CHANNELS + channel, mask=live, other=0.0)
    total = tl.load(sums_p + row * CHANNELS + channel, mask=live, other=0.0)
    return tl.exp2(rate * total) * h + more
