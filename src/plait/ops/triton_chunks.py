"""Chunks of tokens in Triton kernels: where a program works, and rows of channels.

A row of S sequences is cut into chunks of tokens without regard to the sequences; a program takes a chunk of a block of
CHANNELS neighbouring channels, and visits the sequences with tokens in the chunk, and empty ones that begin in it (at
the very end of the row: in its last chunk). A token's numbers in the program's channels, one block in registers, are
loaded and stored as a row: channels lie side by side, tokens any stride apart.
"""

# Triton's functions take and return what mypy has no types for; it knows no (*a, b).
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("length", "sequences", "chunks", "blocks", "chunk_tokens")
"""Sizes that do not change the code: not to be specialised."""


@triton.jit
def place(
    bounds, length, sequences, chunks, blocks, chunk_tokens, CHANNELS: tl.constexpr, VARLEN: tl.constexpr
):
    """Of a program: chunk, row, channels, tokens [first, stop), the first sequence it may visit, that after the last.

    `chunks` of a row; `blocks` of channels, which neighbouring programs take.
    """
    chunk = tl.program_id(0) // blocks
    row = chunk // chunks
    first = chunk % chunks * chunk_tokens
    stop = tl.minimum(first + chunk_tokens, length)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    if VARLEN:
        sequence = 0
        after = sequences
        while after > sequence:  # the first that ends beyond `first`, or begins there or later
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
    return chunk, row, channel, first, stop, sequence, after


@triton.jit
def first_beyond(bounds, sequences, t):
    """The first packed sequence that ends beyond token t."""
    low = 0
    high = sequences
    while high > low:
        middle = (low + high) // 2
        if tl.load(bounds + middle + 1) > t:
            high = middle
        else:
            low = middle + 1
    return low


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
def load_rows(p, t, stride, channel, channels, low, high, ROWS: tl.constexpr):
    """Rows t .. t+ROWS-1 as they are in memory; zeros for those not in [low, high)."""
    rows = ()
    start = p + tl.cast(t, tl.int64) * stride
    for i in tl.static_range(ROWS):
        at = channel * 0 + (t + i)  # a block: the interpreter knows no `and` of a block and a number
        live = (channel < channels) & (at >= low) & (at < high)
        rows = rows + (tl.load(start + i * tl.cast(stride, tl.int64) + channel, mask=live, other=0.0),)
    return rows


@triton.jit
def store_rows(p, rows, t, stride, channel, channels, low, high, ROWS: tl.constexpr):
    """Write those of the rows t .. t+ROWS-1 that are in [low, high), in the dtype of p."""
    start = p + tl.cast(t, tl.int64) * stride
    for i in tl.static_range(ROWS):
        at = channel * 0 + (t + i)
        live = (channel < channels) & (at >= low) & (at < high)
        tl.store(start + i * tl.cast(stride, tl.int64) + channel, rows[i].to(p.dtype.element_ty), mask=live)
