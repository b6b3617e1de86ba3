"""The causal depthwise convolution in Triton, forward and backward.

    y_t = act(b + sum_j w_j x_{t-W+1+j});   g_t = dy_t act'(...)
    dx_s = sum_j w_j g_{s+W-1-j};   dw_j = sum_t g_t x_{t-W+1+j};   db = sum_t g_t

A program takes CHANNELS channels of a chunk of tokens and walks through the chunk in tiles of TILE tokens. A token's
inputs in all the program's channels are one block in registers, a *row*; a tile is a tuple of rows, and the rows that
the next tile needs again stay in registers: every number is read once. Where tokens lie side by side in memory (TIME),
a lane loads the tile of its channel in one piece and takes it apart; otherwise each row is loaded by itself.

A sequence's inputs are numbered from its first token, `begin`; those before it, begin-W+1 to begin-1, are the initial
state (or zeros). The backward walks down through the inputs, so that a tile of dx is written as it was read, and
carries the g of the W-1 tokens above. Chunks are cut without regard to the sequences: a program visits those with
tokens in its chunk, and empty ones that begin in it.
"""

# Triton's functions take and return what mypy has no types for; it knows no (*a, b), and an `if` that is decided while
# compiling stands alone.
# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.selective_scan.gpu_tiles import pack, sigmoid, unpack

TILE = tl.constexpr(8)
SIZES = ("length", "sequences", "chunks", "blocks", "chunk_tokens")


@triton.jit
def load_rows(
    p, at, t0, stride, live, low, high, state_p, state_at, state_stride, begin, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, TIME: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Rows t0 .. t0+ROWS-1 as they are in memory; zeros outside [low, high); STATE: before `begin`, the state's.

    p + at point at the channels of row 0, state_p + state_at at those of the input begin-W+1.
    """
    rows = ()
    start = p + tl.cast(t0, tl.int64) * stride
    if TIME:
        steps = tl.arange(0, ROWS)
        where = start + (at[:, None] + steps[None, :])
        # two ways, because only without a mask over time is it one wide load
        if (t0 >= low) & (t0 + ROWS <= high):
            v = tl.load(where, mask=live[:, None], other=0.0)
        else:
            t = t0 + steps
            v = tl.load(where, mask=live[:, None] & ((t >= low) & (t < high))[None, :], other=0.0)
        rows = unpack(v)
    else:
        for i in tl.static_range(ROWS):
            t = at * 0 + (t0 + i)  # a block: the interpreter knows no `and` of a block and a number
            v = tl.load(start + i * stride + at, mask=live & (t >= low) & (t < high), other=0.0)
            rows = rows + (v,)
    if STATE:
        both = ()
        for i in tl.static_range(ROWS):
            t = at * 0 + (t0 + i)
            before = live & (t < begin) & (t > begin - WIDTH)
            row = tl.cast(t0 + i - begin + WIDTH - 1, tl.int64)
            v = tl.load(state_p + row * state_stride + state_at, mask=before, other=0.0)
            both = both + (tl.where(t < begin, v.to(p.dtype.element_ty), rows[i]),)
        rows = both
    return rows


@triton.jit
def store_rows(p, at, rows, t0, stride, live, low, high, TIME: tl.constexpr):
    """Write those rows of a tile that are in [low, high)."""
    start = p + tl.cast(t0, tl.int64) * stride
    if TIME:
        steps = tl.arange(0, TILE)
        where = start + (at[:, None] + steps[None, :])
        v = pack(rows).to(p.dtype.element_ty)
        if (t0 >= low) & (t0 + TILE <= high):
            tl.store(where, v, mask=live[:, None])
        else:
            t = t0 + steps
            tl.store(where, v, mask=live[:, None] & ((t >= low) & (t < high))[None, :])
    else:
        for i in tl.static_range(TILE):
            t = at * 0 + (t0 + i)
            v = rows[i].to(p.dtype.element_ty)
            tl.store(start + i * stride + at, v, mask=live & (t >= low) & (t < high))


@triton.jit
def place(
    bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS: tl.constexpr, VARLEN: tl.constexpr,
    TIME_FIRST: tl.constexpr,
):  # fmt: skip
    """Of a program: its chunk, row, first channel, tokens [first, stop), first sequence and that after its last.

    Neighbouring programs take what lies side by side in memory: channels, or (TIME_FIRST) chunks.
    """
    pid = tl.program_id(0)
    if TIME_FIRST:
        block = pid // (tl.num_programs(0) // blocks)
        chunk = pid % (tl.num_programs(0) // blocks)
    else:
        block = pid % blocks
        chunk = pid // blocks
    first = chunk % chunks * chunk_tokens
    stop = tl.minimum(first + chunk_tokens, length)
    row = chunk // chunks
    if VARLEN:
        sequence = 0
        after = sequences
        while (
            after > sequence
        ):  # the first sequence that ends beyond `first`, or is empty and begins there or later
            middle = (sequence + after) // 2
            inside = tl.load(bounds + middle + 1) > first
            if inside | (tl.load(bounds + middle) >= first):
                after = middle
            else:
                sequence = middle + 1
        after = sequences
    else:
        sequence = row
        after = row + 1
    return chunk, row, tl.cast(block, tl.int64) * CHANNELS, first, stop, sequence, after


@triton.jit
def bounds_of(bounds, sequence, length, VARLEN: tl.constexpr):
    """First token and end of a sequence in its row."""
    if VARLEN:
        begin = tl.load(bounds + sequence).to(tl.int32)
        end = tl.load(bounds + sequence + 1).to(tl.int32)
    else:
        begin = 0
        end = length
    return begin, end


@triton.jit
def taps_of(w_p, b_p, channel, w_c, w_k, live, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """The taps, W rows, and the bias, one row; float32."""
    taps = ()
    for j in tl.static_range(WIDTH):
        v = tl.load(w_p + channel * w_c + j * w_k, mask=live, other=0.0)
        taps = taps + (v.to(tl.float32),)
    bias = taps[0] * 0.0
    if BIAS:
        bias = tl.load(b_p + channel, mask=live, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_p, w_p, b_p, state_p, y_p, final_p, bounds, x_r, x_t, x_c, y_r, y_t, y_c, w_c, w_k, channels, length, sequences,
    chunks, blocks, chunk_tokens, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    INITIAL: tl.constexpr, VARLEN: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr,
):  # fmt: skip
    """y and every sequence's last W-1 inputs, final (S, W-1, C). state (S, W-1, C) is contiguous."""
    REACH: tl.constexpr = WIDTH - 1
    _chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN, TX
    )
    channel += tl.arange(0, CHANNELS)
    live = channel < channels
    taps, bias = taps_of(w_p, b_p, channel, w_c, w_k, live, WIDTH, BIAS)
    row = tl.cast(row, tl.int64)
    x_p += row * x_r
    y_p += row * y_r
    x_at = channel * x_c
    y_at = channel * y_c
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        own_state = tl.cast(sequence, tl.int64) * REACH * channels
        t0 = own_first // TILE * TILE
        past = load_rows(
            x_p, x_at, t0 - REACH, x_t, live, begin, end, state_p + own_state, channel, channels, begin, WIDTH,
            REACH, False, INITIAL,
        )  # fmt: skip
        window = ()
        for i in tl.static_range(REACH):
            window = window + (past[i].to(tl.float32),)
        for t in range(t0, own_stop, TILE):
            raw = load_rows(
                x_p, x_at, t, x_t, live, begin, own_stop, state_p + own_state, channel, channels, begin, WIDTH,
                TILE, TX, INITIAL,
            )  # fmt: skip
            x = window
            y = ()
            for i in tl.static_range(TILE):
                x = x + (raw[i].to(tl.float32),)
                total = bias
                for j in tl.static_range(WIDTH):
                    total += taps[j] * x[i + j]
                if SILU:
                    total *= sigmoid(total)
                y = y + (total,)
            store_rows(y_p, y_at, y, t, y_t, live, own_first, own_stop, TY)
            window = ()
            for i in tl.static_range(REACH):
                window = window + (x[TILE + i],)
        if end <= stop:  # the sequence ends here
            last = load_rows(
                x_p, x_at, end - REACH, x_t, live, begin, end, state_p + own_state, channel, channels, begin, WIDTH,
                REACH, False, INITIAL,
            )  # fmt: skip
            for i in tl.static_range(REACH):
                tl.store(final_p + own_state + i * channels + channel, last[i], mask=live)
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                # an empty one at the very end belongs to the last chunk
                more = (begin < stop) | (stop == length)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_p, dfinal_p, x_p, w_p, b_p, state_p, dx_p, dstate_p, parts_p, bounds, dy_r, dy_t, dy_c, x_r, x_t, x_c, dx_r,
    dx_t, dx_c, w_c, w_k, channels, length, sequences, chunks, blocks, chunk_tokens, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    VARLEN: tl.constexpr, TX: tl.constexpr, TDY: tl.constexpr, TDX: tl.constexpr,
):  # fmt: skip
    """dx, dstate (INITIAL), and of each chunk its part of dw and db: parts (chunks of all rows, W+1, C)."""
    REACH: tl.constexpr = WIDTH - 1
    NEAR: tl.constexpr = REACH <= TILE  # then a tile is also all that the one above it looks back to
    BELOW: tl.constexpr = TILE if NEAR else REACH
    chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN, TX
    )
    channel += tl.arange(0, CHANNELS)
    live = channel < channels
    taps, bias = taps_of(w_p, b_p, channel, w_c, w_k, live, WIDTH, BIAS)
    row = tl.cast(row, tl.int64)
    x_p += row * x_r
    dy_p += row * dy_r
    dx_p += row * dx_r
    x_at = channel * x_c
    dy_at = channel * dy_c
    dx_at = channel * dx_c
    zero = taps[0] * 0.0
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (zero,)
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        own_state = tl.cast(sequence, tl.int64) * REACH * channels
        # the inputs whose gradients are written here, the initial state's among them; the last g they need
        low = own_first
        if INITIAL:
            if begin >= first:
                low = begin - REACH
        last = tl.minimum(own_stop + REACH, end) - 1
        x_low = tl.maximum(own_first - REACH, begin)
        bottom = (low + 64 * TILE * WIDTH) // TILE * TILE - 64 * TILE * WIDTH  # rounded down, also below zero
        tiles = (last - bottom + TILE) // TILE
        t = bottom + (tiles - 1) * TILE
        here = load_rows(
            x_p, x_at, t, x_t, live, x_low, last + 1, state_p + own_state, channel, channels, begin, WIDTH,
            TILE if NEAR else 0, TX, INITIAL,
        )  # fmt: skip
        ahead = ()
        for _ in tl.static_range(REACH):
            ahead = ahead + (zero,)
        for _tile in range(tiles):
            below = load_rows(
                x_p, x_at, t - BELOW, x_t, live, x_low, last + 1, state_p + own_state, channel, channels, begin, WIDTH,
                TILE if NEAR else BELOW + TILE, TX, INITIAL,
            )  # fmt: skip
            raw = load_rows(
                dy_p, dy_at, t, dy_t, live, own_first, last + 1, state_p, channel, channels, begin, WIDTH, TILE, TDY,
                False,
            )  # fmt: skip
            x = ()
            rows = below + here
            for i in tl.static_range(REACH + TILE):
                x = x + (rows[BELOW - REACH + i].to(tl.float32),)
            g = ahead
            dx = ()
            for i in tl.static_range(TILE - 1, -1, -1):
                grad = raw[i].to(tl.float32)
                if SILU:
                    total = bias
                    for j in tl.static_range(WIDTH):
                        total += taps[j] * x[i + j]
                    s = sigmoid(total)
                    grad *= s * (1.0 + total * (1.0 - s))
                g = (grad,) + g
                own = tl.where(t + i < own_stop, grad, 0.0)
                new = ()
                for j in tl.static_range(WIDTH):
                    new = new + (sums[j] + own * x[i + j],)
                sums = new + (sums[WIDTH] + own,)
                total = g[0] * taps[REACH]
                for j in tl.static_range(REACH):
                    total += g[REACH - j] * taps[j]
                if FINAL:
                    s = tl.cast(t + i - end + REACH, tl.int64)
                    where = live & (x_at * 0 + s >= 0) & (x_at * 0 + s < REACH)
                    v = tl.load(dfinal_p + own_state + s * channels + channel, mask=where, other=0.0)
                    total += v.to(tl.float32)
                if INITIAL:
                    s = tl.cast(t + i - begin + REACH, tl.int64)
                    where = live & (x_at * 0 + s >= 0) & (x_at * 0 + s < REACH) & (x_at * 0 + first <= begin)
                    v = total.to(dstate_p.dtype.element_ty)
                    tl.store(dstate_p + own_state + s * channels + channel, v, mask=where)
                dx = (total,) + dx
            store_rows(dx_p, dx_at, dx, t, dx_t, live, own_first, own_stop, TDX)
            ahead = ()
            for i in tl.static_range(REACH):
                ahead = ahead + (g[i],)
            if NEAR:
                here = below
            t -= TILE
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                more = (begin < stop) | (stop == length)
    at = parts_p + tl.cast(chunk, tl.int64) * ((WIDTH + 1) * channels) + channel
    for j in tl.static_range(WIDTH + 1):
        tl.store(at + j * channels, sums[j], mask=live)
