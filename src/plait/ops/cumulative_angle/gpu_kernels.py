"""The running angle in Triton, forward, and its gradient, which is the running sum from the other end.

    theta_t = (theta_{t-1} + step_t) mod 2 pi;   dstep_t = the sum of dtheta_s over s >= t

A program takes CHANNELS angles of a chunk of tokens and walks through the chunk in tiles, as the convolution does. What
the chunks before it add, `totals_kernel` has summed: a sequence that goes on beyond a chunk is the last one in it. Sums
are float64: in float32 the sum of a few thousand steps has lost three digits of the angle.
"""

# Triton's functions take and return what mypy has no types for; it knows no (*a, b), and an `if` that is decided while
# compiling stands alone.
# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import math

import triton
import triton.language as tl

from plait.ops.triton_chunks import SIZES, bounds_of, first_beyond, load_rows, place, store_rows

TILE = tl.constexpr(8)
_TURN = tl.constexpr(2 * math.pi)
_TURNS = tl.constexpr(0.5 / math.pi)


@triton.jit
def turned(angle):
    """A float64 angle without its full turns; it may be one turn off by rounding."""
    return angle - _TURN * tl.floor(angle * _TURNS)


@triton.jit
def written(angle):
    """The same in float32, in [0, 2 pi)."""
    turn = tl.cast(_TURN, tl.float32)
    rounded = angle.to(tl.float32)
    rounded = tl.where(rounded < 0.0, rounded + turn, rounded)
    # an angle just below a turn may round up to it
    return tl.where(rounded >= turn, rounded - turn, rounded)


@triton.jit(do_not_specialize=SIZES)
def totals_kernel(
    p, totals_p, bounds, channels, length, sequences, chunks, blocks, chunk_tokens, CHANNELS: tl.constexpr,
    BACK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """totals (chunks of all rows, C), float64: of each chunk's last sequence, or (BACK) of its first, the sum in it."""
    chunk, row, channel, first, stop, sequence, _after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    p += tl.cast(row, tl.int64) * length * channels
    if VARLEN:
        if BACK:
            sequence = first_beyond(bounds, sequences, first)
        else:
            sequence = first_beyond(bounds, sequences, stop - 1)
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    begin = tl.maximum(begin, first)
    end = tl.minimum(end, stop)
    total = (channel * 0).to(tl.float64)
    here = load_rows(p, begin, channels, channel, channels, begin, end, TILE)
    for t in range(begin, end, TILE):
        ahead = load_rows(p, t + TILE, channels, channel, channels, begin, end, TILE)
        for i in tl.static_range(TILE):
            total += here[i].to(tl.float64)
        here = ahead
    if not BACK:
        total = turned(total)
    tl.store(totals_p + tl.cast(chunk, tl.int64) * channels + channel, total, mask=channel < channels)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    step_p, initial_p, bounds, totals_p, theta_p, final_p, channels, length, sequences, chunks, blocks, chunk_tokens,
    CHANNELS: tl.constexpr, INITIAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """theta like step, and every sequence's last angle, final (S, C), both float32 and contiguous."""
    chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    live = channel < channels
    step_p += tl.cast(row, tl.int64) * length * channels
    theta_p += tl.cast(row, tl.int64) * length * channels
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        own_state = tl.cast(sequence, tl.int64) * channels + channel
        last = (channel * 0).to(tl.float32)
        if INITIAL:
            last = tl.load(initial_p + own_state, mask=live, other=0.0).to(tl.float32)
        now = last.to(tl.float64)
        for back in range(0, (own_first - begin + chunk_tokens - 1) // chunk_tokens):
            at = totals_p + tl.cast(chunk - 1 - back, tl.int64) * channels + channel
            now += tl.load(at, mask=live, other=0.0)
        here = load_rows(step_p, own_first, channels, channel, channels, own_first, own_stop, TILE)
        for t in range(own_first, own_stop, TILE):
            ahead = load_rows(step_p, t + TILE, channels, channel, channels, own_first, own_stop, TILE)
            angles = ()
            for i in tl.static_range(TILE):
                now = turned(now + here[i].to(tl.float64))
                angle = written(now)
                last = tl.where(channel * 0 + t + i < own_stop, angle, last)
                angles = angles + (angle,)
            store_rows(theta_p, angles, t, channels, channel, channels, own_first, own_stop, TILE)
            here = ahead
        if end <= stop:  # the sequence ends here
            tl.store(final_p + own_state, last, mask=live)
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                more = (begin < stop) | (stop == length)  # an empty one at the very end is the last chunk's


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dtheta_p, dfinal_p, bounds, totals_p, dstep_p, dinitial_p, channels, length, sequences, chunks, blocks,
    chunk_tokens, CHANNELS: tl.constexpr, FINAL: tl.constexpr, INITIAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """dstep like step and (INITIAL) dinitial (S, C), contiguous; FINAL: there is a gradient of the last angles."""
    chunk, row, channel, first, stop, sequence, after = place(
        bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS, VARLEN
    )
    live = channel < channels
    dtheta_p += tl.cast(row, tl.int64) * length * channels
    dstep_p += tl.cast(row, tl.int64) * length * channels
    begin, end = bounds_of(bounds, sequence, length, VARLEN)
    more = sequence < after
    while more:
        own_first = tl.maximum(begin, first)
        own_stop = tl.minimum(end, stop)
        own_state = tl.cast(sequence, tl.int64) * channels + channel
        now = (channel * 0).to(tl.float64)
        if FINAL:
            now += tl.load(dfinal_p + own_state, mask=live, other=0.0).to(tl.float64)
        # the chunks after this one that the sequence reaches, from its end
        beyond = (end - own_stop + chunk_tokens - 1) // chunk_tokens
        for back in range(0, beyond):
            at = totals_p + tl.cast(chunk + beyond - back, tl.int64) * channels + channel
            now += tl.load(at, mask=live, other=0.0)
        here = load_rows(dtheta_p, own_stop - TILE, channels, channel, channels, own_first, own_stop, TILE)
        for back_tile in range(0, tl.cdiv(own_stop - own_first, TILE)):
            t = own_stop - TILE - back_tile * TILE
            ahead = load_rows(dtheta_p, t - TILE, channels, channel, channels, own_first, own_stop, TILE)
            grads = ()
            for i in tl.static_range(TILE):
                now += here[TILE - 1 - i].to(tl.float64)
                grads = (now,) + grads
            store_rows(dstep_p, grads, t, channels, channel, channels, own_first, own_stop, TILE)
            here = ahead
        if INITIAL:
            if begin >= first:
                tl.store(dinitial_p + own_state, now.to(dinitial_p.dtype.element_ty), mask=live)
        sequence += 1
        more = sequence < after
        if VARLEN:
            if more:
                begin, end = bounds_of(bounds, sequence, length, VARLEN)
                more = (begin < stop) | (stop == length)
