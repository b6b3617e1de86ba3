"""A time-invariant diagonal state-space model in Triton: forward, and its gradient.

    h_t = p h_{t-1} + b x_t,   y_t = sum over n of <c, h_t> + D x_t,   p = exp(dA)          (S4D, arXiv 2206.11893)
    v_t = c dy_t + conj(p) v_{t+1};   dx_t = sum over n of <b, v_t> + D dy_t
    db = sum over t of v_t x_t;   dc = sum of dy_t h_t;   dp = sum of v_t conj(h_{t-1});   d(dA) = conj(p) dp

Complex numbers are pairs, and <c, h> = c_re h_re + c_im h_im: c is (2 Re C, -2 Im C). A program takes CHANNELS
channels, one a lane, of a chunk of tokens, and walks through it in tiles: the tile's tokens are in registers while each
state in turn goes through them; between tiles states lie in memory, which for them is the cache.

A sequence that goes on from chunk to chunk: `local_kernel` finds what each chunk makes of it, `carry_kernel` the states
that enter chunks (BACK: the gradients of those that leave). What float32 rounds of p would count at each of the steps
that a state is remembered: at a tile's end the state is multiplied by (p / float32(p)) to the tile's number of tokens.

`weights` (10, N, E), float32: p, b, c, what is missing of p in proportion to it, and p to the tokens of a chunk, as
pairs. States lie as (chunks of all rows, PAIR, N, E), but those given and returned as (S, E, N, PAIR).
"""

# Triton's functions take and return what mypy has no types for; it knows no (*a, b), and an `if` that is decided while
# compiling stands alone.
# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.diagonal_ssm.gpu_tiles import (
    CHANNELS,
    TILE,
    load_given,
    load_pair,
    mended,
    one_back,
    one_step,
    store_given,
    store_pair,
)
from plait.ops.triton_chunks import SIZES, bounds_of, first_beyond, load_rows, place, store_rows


@triton.jit
def prepare_kernel(a_p, b_p, c_p, w_p, channels, chunk_tokens, STATES: tl.constexpr, PAIR: tl.constexpr):
    """`weights` from dA, B and C (E, N, PAIR), of one state and CHANNELS channels a program."""
    n = tl.program_id(0) % STATES
    channel = tl.program_id(0) // STATES * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    at = (channel * STATES + n) * PAIR
    log = tl.load(a_p + at, mask=live, other=0.0).to(tl.float64)
    size = tl.exp(log)
    of_chunk = tl.exp(log * chunk_tokens)
    to = w_p + n * channels + channel
    area = STATES * channels
    if PAIR == 2:
        angle = tl.load(a_p + at + 1, mask=live, other=0.0).to(tl.float64)
        re, im = size * tl.cos(angle), size * tl.sin(angle)
        rounded_im = im.to(tl.float32)
        missing_im = im - rounded_im.to(tl.float64)
        turn = angle * chunk_tokens
        tl.store(to + area, rounded_im, mask=live)
        tl.store(to + 3 * area, tl.load(b_p + at + 1, mask=live, other=0.0).to(tl.float32), mask=live)
        tl.store(to + 5 * area, -2.0 * tl.load(c_p + at + 1, mask=live, other=0.0).to(tl.float32), mask=live)
        tl.store(to + 9 * area, (of_chunk * tl.sin(turn)).to(tl.float32), mask=live)
        of_chunk *= tl.cos(turn)
    else:
        re, im = size, size * 0.0
        missing_im = im
    rounded = re.to(tl.float32)
    missing = re - rounded.to(tl.float64)
    # times conj(p) / |p|^2
    square = size * size
    known = square > 1e-30
    square = tl.where(known, square, 1.0)
    rest = tl.where(known, (re * missing + im * missing_im) / square, 0.0)
    tl.store(to, rounded, mask=live)
    tl.store(to + 2 * area, tl.load(b_p + at, mask=live, other=0.0).to(tl.float32), mask=live)
    c = tl.load(c_p + at, mask=live, other=0.0).to(tl.float32)
    tl.store(to + 4 * area, c * PAIR, mask=live)
    tl.store(to + 6 * area, rest.to(tl.float32), mask=live)
    tl.store(to + 8 * area, of_chunk.to(tl.float32), mask=live)
    if PAIR == 2:
        rest_im = tl.where(known, (re * missing_im - im * missing) / square, 0.0)
        tl.store(to + 7 * area, rest_im.to(tl.float32), mask=live)


@triton.jit(do_not_specialize=SIZES)
def local_kernel(
    x_p, w_p, given_p, bounds, local_p, row_stride, stride, channels, length, sequences, chunks, blocks, chunk_tokens,
    STATES: tl.constexpr, PAIR: tl.constexpr, GIVEN: tl.constexpr, BACK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The state that a chunk's last sequence leaves it with, from zero or where it begins its initial one (`given`).

    BACK: the gradient of the state with which its first sequence enters, from zero or where it ends that of its final
    state; x is dy.
    """
    chunk, row, channel, first, stop, sequence, _after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    live = channel < channels
    area = STATES * channels
    x_p += tl.cast(row, tl.int64) * row_stride
    local_p += tl.cast(chunk, tl.int64) * (PAIR * area) + channel
    w_p += channel
    if VARLEN:
        if BACK:
            sequence = first_beyond(bounds, sequences, first)
        else:
            sequence = first_beyond(bounds, sequences, stop - 1)
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    own_first = tl.maximum(begin, first)
    own_stop = tl.minimum(end, stop)
    inside = begin >= first
    if BACK:
        inside = end <= stop
    for n in range(STATES):
        re = (channel * 0).to(tl.float32)
        im = re
        if GIVEN:
            mask = live & (channel * 0 + inside.to(tl.int32) > 0)
            re, im = load_given(given_p, sequence, n, channel, channels, mask, STATES, PAIR)
        store_pair(local_p + n * channels, re, im, area, live, PAIR)
    tiles = tl.cdiv(own_stop - own_first, TILE)
    for tile in range(0, tiles):
        tl.debug_barrier()  # states written before are read by the lanes that need them now
        t = own_first + tile * TILE
        if BACK:
            t = own_first + (tiles - 1 - tile) * TILE
        count = tl.minimum(own_stop - t, TILE)
        x = load_rows(x_p, t, stride, channel, channels, own_first, own_stop, TILE)
        for n in range(STATES):
            at = w_p + n * channels
            p, pi = load_pair(at, 0, area, live, PAIR)
            re, im = load_pair(local_p + n * channels, 0, area, live, PAIR)
            if BACK:
                c, ci = load_pair(at, 2, area, live, PAIR)
                for i in tl.static_range(TILE):
                    alive = channel * 0 + count > TILE - 1 - i
                    _, _, back, back_im = one_back(re, im, p, pi, c, ci, x[TILE - 1 - i].to(tl.float32), PAIR)
                    re, im = tl.where(alive, back, re), tl.where(alive, back_im, im)
            else:
                b, bi = load_pair(at, 1, area, live, PAIR)
                for i in tl.static_range(TILE):
                    alive = channel * 0 + count > i
                    re, im = one_step(re, im, p, pi, b, bi, x[i].to(tl.float32), alive, PAIR)
            re, im = mended(re, im, at, area, live, count, BACK, PAIR)
            store_pair(local_p + n * channels, re, im, area, live, PAIR)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    local_p, w_p, bounds, carry_p, channels, length, sequences, chunks, blocks, chunk_tokens, STATES: tl.constexpr,
    PAIR: tl.constexpr, BACK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The states that enter chunks, but the first (BACK: the gradients of those that leave, but the last).

    A program takes one state and CHANNELS channels of a row.
    """
    n = tl.program_id(0) % STATES
    row = tl.program_id(0) // STATES // blocks
    channel = tl.program_id(0) // STATES % blocks * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    area = STATES * channels
    at = n * channels + channel
    q, qi = load_pair(w_p + at, 4, area, live, PAIR)
    if BACK:
        qi = -qi
    re = (channel * 0).to(tl.float32)
    im = re
    for step in range(1, chunks):
        to = step  # the chunk that is written, and the one that it follows from
        source = step - 1
        if BACK:
            to = chunks - 1 - step
            source = to + 1
        # is what passed through `source` of the same sequence, and from before it?
        deep = channel * 0 + step > 1
        if VARLEN:
            edge = tl.maximum(to, source) * chunk_tokens
            begin, end = bounds_of(bounds, first_beyond(bounds, sequences, edge), length, VARLEN)
            if BACK:
                deep = channel * 0 + end > edge + chunk_tokens
            else:
                deep = channel * 0 + begin < edge - chunk_tokens
        more, more_im = load_pair(
            local_p + (tl.cast(row, tl.int64) * chunks + source) * (PAIR * area) + at, 0, area, live, PAIR
        )
        new = more + tl.where(deep, q * re, 0.0)
        if PAIR == 2:
            new -= tl.where(deep, qi * im, 0.0)
            im = more_im + tl.where(deep, q * im + qi * re, 0.0)
        re = new
        store_pair(
            carry_p + (tl.cast(row, tl.int64) * chunks + to) * (PAIR * area) + at, re, im, area, live, PAIR
        )


@triton.jit
def entering(
    to_p, carry_p, initial_p, begins, sequence, channel, channels, live, area, STATES: tl.constexpr, PAIR: tl.constexpr,
    INITIAL: tl.constexpr,
):  # fmt: skip
    """Write the states with which a sequence enters a chunk: carried, or where it begins the initial ones or zeros.

    Or the gradients of those with which it leaves: where it ends, that of the final ones.
    """
    for n in range(STATES):
        carried = live & (channel * 0 + begins.to(tl.int32) == 0)
        re, im = load_pair(carry_p + n * channels, 0, area, carried, PAIR)
        if INITIAL:
            own = live & (channel * 0 + begins.to(tl.int32) > 0)
            own_re, own_im = load_given(initial_p, sequence, n, channel, channels, own, STATES, PAIR)
            re += own_re
            im += own_im
        store_pair(to_p + n * channels, re, im, area, live, PAIR)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_p, w_p, d_p, initial_p, bounds, carry_p, state_p, y_p, final_p, row_stride, stride, channels, length, sequences,
    chunks, blocks, chunk_tokens, STATES: tl.constexpr, PAIR: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """y (rows, T, E) and the final states, contiguous; the states of a program lie in state_p between tiles."""
    chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    live = channel < channels
    area = STATES * channels
    x_p += tl.cast(row, tl.int64) * row_stride
    y_p += tl.cast(row, tl.int64) * length * channels
    carry_p += tl.cast(chunk, tl.int64) * (PAIR * area) + channel
    state_p += tl.cast(chunk, tl.int64) * (PAIR * area) + channel
    w_p += channel
    skip = (channel * 0).to(tl.float32)
    if SKIP:
        skip = tl.load(d_p + channel, mask=live, other=0.0).to(tl.float32)
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        entering(
            state_p, carry_p, initial_p, begin >= first, sequence, channel, channels, live, area, STATES, PAIR, INITIAL
        )  # fmt: skip
        for t in range(own_first, own_stop, TILE):
            tl.debug_barrier()  # states written before are read by the lanes that need them now
            count = tl.minimum(own_stop - t, TILE)
            x = load_rows(x_p, t, stride, channel, channels, own_first, own_stop, TILE)
            y = ()
            for i in tl.static_range(TILE):
                y = y + (skip * x[i].to(tl.float32),)
            for n in range(STATES):
                at = w_p + n * channels
                p, pi = load_pair(at, 0, area, live, PAIR)
                b, bi = load_pair(at, 1, area, live, PAIR)
                c, ci = load_pair(at, 2, area, live, PAIR)
                re, im = load_pair(state_p + n * channels, 0, area, live, PAIR)
                read = ()
                for i in tl.static_range(TILE):
                    alive = channel * 0 + count > i
                    re, im = one_step(re, im, p, pi, b, bi, x[i].to(tl.float32), alive, PAIR)
                    v = y[i] + c * re
                    if PAIR == 2:
                        v += ci * im
                    read = read + (v,)
                y = read
                re, im = mended(re, im, at, area, live, count, False, PAIR)
                store_pair(state_p + n * channels, re, im, area, live, PAIR)
            store_rows(y_p, y, t, channels, channel, channels, own_first, own_stop, TILE)
        if end <= stop:  # the sequence ends here
            tl.debug_barrier()
            for n in range(STATES):
                re, im = load_pair(state_p + n * channels, 0, area, live, PAIR)
                store_given(final_p, re, im, sequence, n, channel, channels, live, STATES, PAIR)
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                more = (begin < stop) | (stop == length)  # an empty one at the very end is the last chunk's


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_p, x_p, w_p, d_p, initial_p, dfinal_p, bounds, carry_p, back_p, kept_p, v_p, parts_p, dx_p, dinitial_p,
    dy_row, dy_stride, row_stride, stride, channels, length, sequences, chunks, blocks, chunk_tokens,
    STATES: tl.constexpr, PAIR: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """dx (rows, T, E), dinitial (INITIAL), and parts (chunks, 3 PAIR N + 1, E): of dp, db, dc as pairs, of dD.

    For each sequence it goes through the chunk once more, keeping the states before each tile, and then back.
    """
    chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    live = channel < channels
    area = STATES * channels
    x_p += tl.cast(row, tl.int64) * row_stride
    dy_p += tl.cast(row, tl.int64) * dy_row
    dx_p += tl.cast(row, tl.int64) * length * channels
    carry_p += tl.cast(chunk, tl.int64) * (PAIR * area) + channel
    back_p += tl.cast(chunk, tl.int64) * (PAIR * area) + channel
    v_p += tl.cast(chunk, tl.int64) * (PAIR * area) + channel
    parts_p += tl.cast(chunk, tl.int64) * (3 * PAIR * area + channels) + channel
    w_p += channel
    zero = (channel * 0).to(tl.float32)
    for k in range(3 * PAIR * STATES):
        tl.store(parts_p + k * channels, zero, mask=live)
    dskip = zero
    skip = zero
    if SKIP:
        skip = tl.load(d_p + channel, mask=live, other=0.0).to(tl.float32)
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        # tiles of different sequences or chunks begin at different tokens, or one comes after the other in number
        slot = row * (tl.cdiv(length, TILE) + chunks) + chunk % chunks + own_first // TILE
        if VARLEN:
            slot += sequence
        kept = kept_p + tl.cast(slot, tl.int64) * (PAIR * area) + channel
        entering(
            kept, carry_p, initial_p, begin >= first, sequence, channel, channels, live, area, STATES, PAIR, INITIAL
        )  # fmt: skip
        entering(
            v_p, back_p, dfinal_p, end <= stop, sequence, channel, channels, live, area, STATES, PAIR, FINAL
        )  # fmt: skip
        tiles = tl.cdiv(own_stop - own_first, TILE)
        for tile in range(0, tiles - 1):
            tl.debug_barrier()  # states written before are read by the lanes that need them now
            x = load_rows(x_p, own_first + tile * TILE, stride, channel, channels, own_first, own_stop, TILE)
            for n in range(STATES):
                at = w_p + n * channels
                p, pi = load_pair(at, 0, area, live, PAIR)
                b, bi = load_pair(at, 1, area, live, PAIR)
                re, im = load_pair(kept + n * channels, 0, area, live, PAIR)
                for i in tl.static_range(TILE):
                    re, im = one_step(re, im, p, pi, b, bi, x[i].to(tl.float32), live, PAIR)
                re, im = mended(re, im, at, area, live, TILE, False, PAIR)
                store_pair(kept + PAIR * area + n * channels, re, im, area, live, PAIR)
            kept += PAIR * area
        for back_tile in range(0, tiles):
            tl.debug_barrier()
            t = own_first + (tiles - 1 - back_tile) * TILE
            count = tl.minimum(own_stop - t, TILE)
            x = load_rows(x_p, t, stride, channel, channels, own_first, own_stop, TILE)
            dy = load_rows(dy_p, t, dy_stride, channel, channels, own_first, own_stop, TILE)
            dx = ()
            for i in tl.static_range(TILE):
                dx = dx + (skip * dy[i].to(tl.float32),)
                dskip += x[i].to(tl.float32) * dy[i].to(tl.float32)
            for n in range(STATES):
                at = w_p + n * channels
                p, pi = load_pair(at, 0, area, live, PAIR)
                b, bi = load_pair(at, 1, area, live, PAIR)
                c, ci = load_pair(at, 2, area, live, PAIR)
                re, im = load_pair(kept + n * channels, 0, area, live, PAIR)
                into = parts_p + n * channels
                dp, dpi = load_pair(into, 0, area, live, PAIR)
                db, dbi = load_pair(into + PAIR * area, 0, area, live, PAIR)
                dc, dci = load_pair(into + 2 * PAIR * area, 0, area, live, PAIR)
                past = ()
                past_im = ()
                for i in tl.static_range(TILE):
                    past = past + (re,)
                    past_im = past_im + (im,)
                    alive = channel * 0 + count > i
                    re, im = one_step(re, im, p, pi, b, bi, x[i].to(tl.float32), alive, PAIR)
                    dc += dy[i].to(tl.float32) * re
                    dci += dy[i].to(tl.float32) * im
                passed, passed_im = load_pair(v_p + n * channels, 0, area, live, PAIR)
                written = ()
                for i in tl.static_range(TILE - 1, -1, -1):
                    alive = channel * 0 + count > i
                    v, vi, back, back_im = one_back(
                        passed, passed_im, p, pi, c, ci, dy[i].to(tl.float32), PAIR
                    )
                    v = tl.where(alive, v, 0.0)
                    passed = tl.where(alive, back, passed)
                    d = dx[i] + b * v
                    dp += v * past[i]
                    db += v * x[i].to(tl.float32)
                    if PAIR == 2:
                        vi = tl.where(alive, vi, 0.0)
                        passed_im = tl.where(alive, back_im, passed_im)
                        d += bi * vi
                        dp += vi * past_im[i]
                        dpi += vi * past[i] - v * past_im[i]
                        dbi += vi * x[i].to(tl.float32)
                    written = (d,) + written
                dx = written
                passed, passed_im = mended(passed, passed_im, at, area, live, count, True, PAIR)
                store_pair(v_p + n * channels, passed, passed_im, area, live, PAIR)
                store_pair(into, dp, dpi, area, live, PAIR)
                store_pair(into + PAIR * area, db, dbi, area, live, PAIR)
                store_pair(into + 2 * PAIR * area, dc, dci, area, live, PAIR)
            store_rows(dx_p, dx, t, channels, channel, channels, own_first, own_stop, TILE)
            kept -= PAIR * area
        if INITIAL:
            if begin >= first:
                tl.debug_barrier()
                for n in range(STATES):
                    re, im = load_pair(v_p + n * channels, 0, area, live, PAIR)
                    store_given(dinitial_p, re, im, sequence, n, channel, channels, live, STATES, PAIR)
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                more = (begin < stop) | (stop == length)
    tl.store(parts_p + 3 * PAIR * area, dskip, mask=live)


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(
    parts_p, w_p, da_p, db_p, dc_p, dd_p, parts, channels, STATES: tl.constexpr, PAIR: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The gradients of dA, B and C (E, N, PAIR), one state a program, and of D, from `parts` added in their order."""
    n = tl.program_id(0) % (STATES + 1)
    channel = tl.program_id(0) // (STATES + 1) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    area = STATES * channels
    each = 3 * PAIR * area + channels
    dp = (channel * 0).to(tl.float32)
    dpi, db, dbi, dc, dci = dp, dp, dp, dp, dp
    if n == STATES:
        if SKIP:
            for part in range(parts):
                at = parts_p + tl.cast(part, tl.int64) * each + 3 * PAIR * area + channel
                dp += tl.load(at, mask=live, other=0.0)
            tl.store(dd_p + channel, dp.to(dd_p.dtype.element_ty), mask=live)
    else:
        for part in range(parts):
            at = parts_p + tl.cast(part, tl.int64) * each + n * channels + channel
            more, more_im = load_pair(at, 0, area, live, PAIR)
            dp += more
            dpi += more_im
            more, more_im = load_pair(at + PAIR * area, 0, area, live, PAIR)
            db += more
            dbi += more_im
            more, more_im = load_pair(at + 2 * PAIR * area, 0, area, live, PAIR)
            dc += more
            dci += more_im
        p, pi = load_pair(w_p + n * channels + channel, 0, area, live, PAIR)
        # through exp: times conj(p); and through c = (2 Re C, -2 Im C)
        store_given(da_p, p * dp + pi * dpi, p * dpi - pi * dp, 0, n, channel, channels, live, STATES, PAIR)
        store_given(db_p, db, dbi, 0, n, channel, channels, live, STATES, PAIR)
        store_given(dc_p, dc * PAIR, -2.0 * dci, 0, n, channel, channels, live, STATES, PAIR)
