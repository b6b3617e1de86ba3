"""The causal depthwise convolution in Triton, forward and backward.

    y_t = act(b + sum_j w_j x_{t-W+1+j});   g_t = dy_t act'(...)
    dx_s = sum_j w_j g_{s+W-1-j};   dw_j = sum_t g_t x_{t-W+1+j};   db = sum_t g_t

A program takes CHANNELS channels of a chunk of tokens and walks through the chunk in tiles of TILE tokens. A token's
inputs in all the program's channels are one block in registers, a *row*; a tile is a tuple of rows. Every number is
read once: the rows that the next tile needs again stay in registers, and the next tile's own rows are loaded before
this one is worked on. The backward walks down, and carries the g of the W-1 tokens above.

A sequence's inputs are numbered from its first token, `begin`; those before it, begin-W+1 to begin-1, are the initial
state (or zeros). Chunks are cut without regard to the sequences: a program visits those with tokens in its chunk, and
empty ones that begin in it.
"""

# Triton's functions take and return what mypy has no types for; it knows no (*a, b), and an `if` that is decided while
# compiling stands alone.
# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.selective_scan.gpu_tiles import sigmoid
from plait.ops.triton_chunks import SIZES, bounds_of, load_rows, place, store_rows

TILE = tl.constexpr(8)


@triton.jit
def inputs(
    p, t, stride, channel, channels, low, high, state_p, begin, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """Rows t .. t+ROWS-1 of a sequence's inputs as they are in memory; zeros outside [low, high) and the state.

    STATE: state_p points at the sequence's state (W-1, C), contiguous, which stands before `begin`.
    """
    rows = load_rows(p, t, stride, channel, channels, low, high, ROWS)
    if STATE:
        both = ()
        for i in tl.static_range(ROWS):
            s = load_rows(state_p, t + i - begin + WIDTH - 1, channels, channel, channels, 0, WIDTH - 1, 1)[0]
            both = both + (tl.where(t + i < begin, s.to(p.dtype.element_ty), rows[i]),)
        rows = both
    return rows


@triton.jit
def taps_of(w_p, b_p, channel, channels, w_c, w_k, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """The taps, W rows, and the bias, one row; float32."""
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (
            tl.load(w_p + channel * w_c + j * w_k, mask=channel < channels, other=0.0).to(tl.float32),
        )
    bias = taps[0] * 0.0
    if BIAS:
        bias = tl.load(b_p + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def weigh(x, first, taps, bias, WIDTH: tl.constexpr):
    """b + sum_j w_j x_{first+j} of rows x."""
    total = bias
    for j in tl.static_range(WIDTH):
        total += taps[j] * x[first + j]
    return total


@triton.jit
def slope(dy, x, first, taps, bias, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """A row of g from that of dy, and from rows x, of which `first` meets the first tap."""
    g = dy.to(tl.float32)
    if SILU:
        v = weigh(x, first, taps, bias, WIDTH)
        s = sigmoid(v)
        g *= s * (1.0 + v * (1.0 - s))
    return g


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_p, w_p, b_p, state_p, y_p, final_p, bounds, x_r, x_t, w_c, w_k, channels, length, sequences, chunks, blocks,
    chunk_tokens, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    INITIAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """y and every sequence's last W-1 inputs, final (S, W-1, C), both contiguous."""
    REACH: tl.constexpr = WIDTH - 1
    _chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    taps, bias = taps_of(w_p, b_p, channel, channels, w_c, w_k, WIDTH, BIAS)
    x_p += tl.cast(row, tl.int64) * x_r
    y_p += tl.cast(row, tl.int64) * length * channels
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        own_state = tl.cast(sequence, tl.int64) * REACH * channels
        past = inputs(
            x_p,
            own_first - REACH,
            x_t,
            channel,
            channels,
            begin,
            end,
            state_p + own_state,
            begin,
            WIDTH,
            REACH,
            INITIAL,
        )
        here = load_rows(x_p, own_first, x_t, channel, channels, own_first, own_stop, TILE)
        window = ()
        for i in tl.static_range(REACH):
            window = window + (past[i].to(tl.float32),)
        for t in range(own_first, own_stop, TILE):
            x = window
            for i in tl.static_range(TILE):
                x = x + (here[i].to(tl.float32),)
            here = load_rows(x_p, t + TILE, x_t, channel, channels, own_first, own_stop, TILE)
            y = ()
            for i in tl.static_range(TILE):
                v = weigh(x, i, taps, bias, WIDTH)
                if SILU:
                    v *= sigmoid(v)
                y = y + (v,)
            store_rows(y_p, y, t, channels, channel, channels, own_first, own_stop, TILE)
            window = ()
            for i in tl.static_range(REACH):
                window = window + (x[TILE + i],)
        if end <= stop:  # the sequence ends here
            last = inputs(
                x_p,
                end - REACH,
                x_t,
                channel,
                channels,
                begin,
                end,
                state_p + own_state,
                begin,
                WIDTH,
                REACH,
                INITIAL,
            )
            store_rows(final_p + own_state, last, 0, channels, channel, channels, 0, REACH, REACH)
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                more = (begin < stop) | (stop == length)  # an empty one at the very end is the last chunk's


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_p, dfinal_p, x_p, w_p, b_p, state_p, dx_p, dstate_p, parts_p, bounds, dy_r, dy_t, x_r, x_t, w_c, w_k, channels,
    length, sequences, chunks, blocks, chunk_tokens, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr,
    BIAS: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """dx, dstate (INITIAL), and of each chunk its part of dw and db: parts (chunks of all rows, W+1, C)."""
    REACH: tl.constexpr = WIDTH - 1
    NEAR: tl.constexpr = REACH <= TILE  # then a tile is also all that the one above it looks back to
    BELOW: tl.constexpr = TILE if NEAR else REACH
    chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    taps, bias = taps_of(w_p, b_p, channel, channels, w_c, w_k, WIDTH, BIAS)
    x_p += tl.cast(row, tl.int64) * x_r
    dy_p += tl.cast(row, tl.int64) * dy_r
    dx_p += tl.cast(row, tl.int64) * length * channels
    zero = taps[0] * 0.0
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (zero,)
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        own_state = state_p + tl.cast(sequence, tl.int64) * REACH * channels
        own_dstate = dstate_p + tl.cast(sequence, tl.int64) * REACH * channels
        own_dfinal = dfinal_p + tl.cast(sequence, tl.int64) * REACH * channels
        # the inputs whose gradients are written here, the initial state's among them
        low = own_first
        if INITIAL:
            if begin >= first:
                low = begin - REACH
        own_reach = own_first - low
        x_low = tl.maximum(own_first - REACH, begin)
        # the g of the tokens above that the chunk's last inputs reach
        above = inputs(
            x_p, own_stop - REACH, x_t, channel, channels, x_low, tl.minimum(own_stop + REACH, end), own_state, begin,
            WIDTH, 2 * REACH, INITIAL,
        )  # fmt: skip
        ahead = ()
        for i in tl.static_range(REACH):
            v = load_rows(dy_p, own_stop + i, dy_t, channel, channels, own_stop, end, 1)[0]
            wide = ()
            for j in tl.static_range(2 * REACH):
                wide = wide + (above[j].to(tl.float32),)
            ahead = ahead + (slope(v, wide, i, taps, bias, WIDTH, SILU),)
        tiles = tl.cdiv(own_stop - low, TILE)
        t = own_stop - TILE
        here = inputs(
            x_p,
            t,
            x_t,
            channel,
            channels,
            x_low,
            own_stop,
            own_state,
            begin,
            WIDTH,
            TILE if NEAR else 0,
            INITIAL,
        )
        dy = load_rows(dy_p, t, dy_t, channel, channels, own_first, own_stop, TILE)
        for _tile in range(tiles):
            below = inputs(
                x_p, t - BELOW, x_t, channel, channels, x_low, own_stop, own_state, begin, WIDTH,
                TILE if NEAR else BELOW + TILE, INITIAL,
            )  # fmt: skip
            next_dy = load_rows(dy_p, t - TILE, dy_t, channel, channels, own_first, own_stop, TILE)
            x = ()
            rows = below + here
            for i in tl.static_range(REACH + TILE):
                x = x + (rows[BELOW - REACH + i].to(tl.float32),)
            g = ahead
            dx = ()
            for i in tl.static_range(TILE - 1, -1, -1):
                grad = slope(dy[i], x, i, taps, bias, WIDTH, SILU)
                g = (grad,) + g
                new = ()
                for j in tl.static_range(WIDTH):
                    new = new + (sums[j] + grad * x[i + j],)
                sums = new + (sums[WIDTH] + grad,)
                total = grad * taps[REACH]
                for j in tl.static_range(REACH):
                    total += g[REACH - j] * taps[j]
                if FINAL:
                    v = load_rows(own_dfinal, t + i - end + REACH, channels, channel, channels, 0, REACH, 1)[
                        0
                    ]
                    total += v.to(tl.float32)
                dx = (total,) + dx
            store_rows(dx_p, dx, t, channels, channel, channels, own_first, own_stop, TILE)
            if INITIAL:
                if t < begin:
                    store_rows(
                        own_dstate, dx, t - begin + REACH, channels, channel, channels, 0, own_reach, TILE
                    )
            ahead = ()
            for i in tl.static_range(REACH):
                ahead = ahead + (g[i],)
            if NEAR:
                here = below
            dy = next_dy
            t -= TILE
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                more = (begin < stop) | (stop == length)
    parts_p += tl.cast(chunk, tl.int64) * (WIDTH + 1) * channels
    store_rows(parts_p, sums, 0, channels, channel, channels, 0, WIDTH + 1, WIDTH + 1)
