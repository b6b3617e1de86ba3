"""Mamba-2's and Mamba-3's recurrence on a GPU, the forward pass, in Triton.

    S_t = exp(a_t) S_{t-1} + w_t k_t x_t^T          S (N, P) of each head
    y_t = S_t^T q_t + D x_t                         (Mamba-2: k = B, q = C, w = dt, a = dt A)
    y_t = (exp(a_t) S_{t-1} + g_t k_t x_t^T)^T q_t + D x_t          (`GATED`: Mamba-3, g = dt lam)

Tokens are cut into blocks of Q; a block never holds two sequences. With c the sum of a log2(e) inside a block, up to
and including a token, and c_Q the last one:

    y_i = 2^c_i S_in^T q_i + sum_{j<=i} (q_i . k_j) 2^(c_i - c_j) w_j x_j + D x_i,
    S_out = 2^c_Q S_in + sum_j k_j (2^(c_Q - c_j) w_j x_j)^T.

A program walks the blocks of one piece of a sequence, for one head or a slice of its columns P, with S in registers
(float32) all along. Where sequences times heads are too few programs, a sequence is cut into pieces: `state_kernel`
first finds what each piece adds, `carry_kernel` the state that enters each. Exponents are differences, clamped to 0
before exp2; nothing is ever divided by a decay. (State space duality: arXiv 2405.21060, section 6; Mamba-3's weights:
arXiv 2603.15569.)

Glossary: L tokens a row, K blocks a row, H heads, M columns (slices) a head, R rows a token (Mamba-3's rank),
_s, _t, _r, _h strides of sequence, token, rank, head (or group). `vec` (blocks, H, V, T) holds for the T tokens of a
block: c, w, then g if GATED, then the digits of c that float32 has no room for if EXACT. `table` (blocks, 4), for
packed rows: first token, tokens, sequence, 1 for a sequence's first block + 2 for its last one.
"""

from __future__ import annotations

# Triton kernels read like Python but are typed by Triton, which decides an `if` on a constexpr before it looks inside:
# what follows may not be joined to it by `and`.
# mypy: ignore-errors
# ruff: noqa: SIM102
import triton
import triton.language as tl

from plait.ops.ssd.gpu_tiles import (
    decay_to,
    exponents,
    load_steps,
    load_tile,
    place_in_row,
    reads,
    rows_of,
    state_tile,
    store_tile,
    two_parts,
)

# What has decayed by 2^-60 is nothing beside what has not.
FAINT = tl.constexpr(-60.0)


@triton.jit
def add_block(S, x, kT, w, end, TWICE: tl.constexpr, PRECISION: tl.constexpr):
    """2^end S + k^T (w x): the state after a block. TWICE: with w x, of 16 bits, in two parts."""
    scaled = x.to(tl.float32) * w[:, None]
    S *= tl.exp2(end)
    if TWICE:
        high, low = two_parts(scaled, x.dtype)
        S = tl.dot(kT, high, S)
        S = tl.dot(kT, low, S)
    else:
        S = tl.dot(kT, scaled.to(x.dtype), S, input_precision=PRECISION)
    return S


@triton.jit
def entering(initial_ptr, entry_ptr, row, piece, number, last, h, H, n, p, P: tl.constexpr, N: tl.constexpr,
             NB: tl.constexpr, PB: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr,
             ENTRY: tl.constexpr):  # fmt: skip
    """What enters a piece; packed rows: unless a sequence begins there. `last`: the number of the row's first piece."""
    S = tl.zeros((NB, PB), tl.float32)
    if INITIAL and not VARLEN:
        if number == last:
            at, mask = state_tile(initial_ptr, row, h, H, n, p, P, N)
            S = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if ENTRY:
        if number != last:
            at, mask = state_tile(entry_ptr, piece, h, H, n, p, P, N)
            S = tl.load(at, mask=mask, other=0.0)
    return S


@triton.jit
def beginning(initial_ptr, sequence, h, H, n, p, P: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
              PB: tl.constexpr, INITIAL: tl.constexpr):  # fmt: skip
    """The state with which a sequence begins."""
    if INITIAL:
        at, mask = state_tile(initial_ptr, sequence.to(tl.int64), h, H, n, p, P, N)
        S = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        S = tl.zeros((NB, PB), tl.float32)
    return S


@triton.jit
def state_kernel(x_ptr, k_ptr, vec_ptr, table_ptr, initial_ptr, entry_ptr, out_ptr, final_ptr, decay_ptr,
                 L, K, PIECE, PIECES, H, M, HEADS_PER_GROUP, x_s, x_t, x_r, x_h, k_s, k_t, k_r, k_h,
                 Q: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                 PB: tl.constexpr, NB: tl.constexpr, V: tl.constexpr, SCAN: tl.constexpr, REVERSE: tl.constexpr,
                 VARLEN: tl.constexpr, FULL: tl.constexpr, INITIAL: tl.constexpr, ENTRY: tl.constexpr,
                 STORE: tl.constexpr, FINAL: tl.constexpr, PIECE_FINAL: tl.constexpr, TWICE: tl.constexpr,
                 EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Walk the states of one piece. out (blocks, H M, NB, PB): the state that enters each block.

    REVERSE: from the last block to the first, for gradients: x is dy, k is q, and a row is weighted by 2^c_i. TWICE:
    what is added keeps more digits than 16 bits have, and so do the sums of decays' gradients over slow heads.
    """
    pid = tl.program_id(0).to(tl.int64)
    column = pid % (H * M)
    h, slice_ = column // M, column % M
    piece = pid // (H * M)
    row = piece // PIECES
    number = (piece % PIECES).to(tl.int32)
    lo = number * PIECE
    hi = tl.minimum(lo + PIECE, K)
    if PIECE_FINAL:
        # nobody asks what the last piece hands on
        hi = tl.where(number == (0 if REVERSE else PIECES - 1), lo, hi)
        # nor what has decayed to nothing before it leaves the piece
        b = tl.arange(0, SCAN)
        ends_at = vec_ptr + ((row * K + lo + b) * H + h) * (V * T) + T - 1
        ends = tl.load(ends_at, mask=lo + b < hi, other=0.0)
        faded = tl.cumsum(ends, 0) - ends if REVERSE else tl.sum(ends, 0) - tl.cumsum(ends, 0)
        skipped = tl.sum(((lo + b < hi) & (faded < FAINT)).to(tl.int32), 0)
        if REVERSE:
            hi -= skipped
        else:
            lo += skipped
    n = tl.arange(0, NB)
    m = tl.arange(0, PB)
    p = (slice_ * PB).to(tl.int32) + m
    i = tl.arange(0, Q)
    i_t = i // R
    x_at = x_ptr + row * x_s + h * x_h + (rows_of(i, x_t, x_r, R)[:, None] + p[None, :])
    k_at = k_ptr + row * k_s + (h // HEADS_PER_GROUP) * k_h + (rows_of(i, k_t, k_r, R)[None, :] + n[:, None])
    out_at = out_ptr + column * (NB * PB) + (n[:, None] * PB + m[None, :])
    S = entering(initial_ptr, entry_ptr, row, piece, number, PIECES - 1 if REVERSE else 0, h, H, n, p, P, N,
                 NB, PB, VARLEN, INITIAL, ENTRY)  # fmt: skip
    total = 0.0
    fresh = 0
    first = row * K + (hi - 1 if REVERSE else lo)
    next_end = tl.load(vec_ptr + (first * H + h) * (V * T) + T - 1, mask=hi > lo, other=0.0)
    for step in range(0, hi - lo):
        block = first - step if REVERSE else first + step
        start, count = place_in_row(block, hi - 1 - step if REVERSE else lo + step, table_ptr, L, T, VARLEN)
        vec = vec_ptr + (block * H + h) * (V * T)
        end = next_end
        after = block + tl.where(step + 1 < hi - lo, -1 if REVERSE else 1, 0)
        # one step ahead: nothing waits for it
        next_end = tl.load(vec_ptr + (after * H + h) * (V * T) + T - 1)
        if VARLEN:
            sequence = tl.load(table_ptr + block * 4 + 2)
            flags = tl.load(table_ptr + block * 4 + 3)
            if (flags // 2 if REVERSE else flags % 2) == 1:
                S = beginning(initial_ptr, sequence, h, H, n, p, P, N, NB, PB, INITIAL)
                fresh = 1
        inside = (i < count * R) & (i_t < T)
        x = load_tile(x_at + start * x_t, inside[:, None], (p < P)[None, :], not FULL, P % PB != 0)
        kT = load_tile(k_at + start * k_t, inside[None, :], (n < N)[:, None], not FULL, N != NB)
        c = load_steps(vec, i_t, T, Q, R)
        if STORE:
            tl.store(out_at + block * (H * M) * (NB * PB), S.to(x.dtype))
        if REVERSE:
            w = tl.exp2(c)
        else:
            w = load_steps(vec + T, i_t, T, Q, R) * decay_to(end, c, vec, i_t, T, Q, R, V, EXACT)
        S = add_block(S, x, kT, w, end, TWICE, PRECISION)
        total += end
        if VARLEN and FINAL:
            if (flags % 2 if REVERSE else flags // 2) == 1:
                at, mask = state_tile(final_ptr, sequence.to(tl.int64), h, H, n, p, P, N)
                tl.store(at, S, mask=mask)
    if FINAL and not VARLEN:
        if number == (0 if REVERSE else PIECES - 1):
            at, mask = state_tile(final_ptr, row, h, H, n, p, P, N)
            tl.store(at, S, mask=mask)
    if PIECE_FINAL:
        at, mask = state_tile(final_ptr, piece, h, H, n, p, P, N)
        tl.store(at, S, mask=mask)
        # beyond a sequence's edge, or what was skipped, nothing of what entered is left
        tl.store(decay_ptr + piece * H + h, tl.where(fresh + skipped > 0, -float("inf"), total))


@triton.jit
def carry_kernel(final_ptr, decay_ptr, entry_ptr, H, PIECES, SIZE,
                 BLOCK: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """entry[i] = what enters piece i, from what each piece adds and how it decays; pieces of one row and head."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pid = tl.program_id(1).to(tl.int64)
    row, h = pid // H, pid % H
    mask = o < SIZE
    S = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, PIECES - 1):
        piece = row * PIECES + (PIECES - 1 - step if REVERSE else step)
        total = tl.load(decay_ptr + piece * H + h)
        added = tl.load(final_ptr + (piece * H + h) * SIZE + o, mask=mask, other=0.0)
        S = tl.where(total > -float("inf"), S * tl.exp2(total), 0.0) + added
        after = piece - 1 if REVERSE else piece + 1
        tl.store(entry_ptr + (after * H + h) * SIZE + o, S, mask=mask)


@triton.jit
def empty_kernel(cu_ptr, from_ptr, to_ptr, SIZE, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """to[s] = from[s] (0 unless GIVEN) for the sequences s without tokens, bit for bit."""
    s = tl.program_id(0).to(tl.int64)
    if tl.load(cu_ptr + s + 1) == tl.load(cu_ptr + s):
        for begin in range(0, SIZE, BLOCK):
            o = begin + tl.arange(0, BLOCK)
            value = tl.zeros((BLOCK,), tl.float32)
            if GIVEN:
                value = tl.load(from_ptr + s * SIZE + o, mask=o < SIZE, other=0.0).to(tl.float32)
            tl.store(to_ptr + s * SIZE + o, value, mask=o < SIZE)


@triton.jit
def forward_kernel(x_ptr, k_ptr, q_ptr, vec_ptr, D_ptr, table_ptr, initial_ptr, entry_ptr, y_ptr, final_ptr,
                   L, K, PIECE, PIECES, H, M, HEADS_PER_GROUP,
                   x_s, x_t, x_r, x_h, k_s, k_t, k_r, k_h, q_s, q_t, q_r, q_h,
                   Q: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                   PB: tl.constexpr, NB: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr,
                   FULL: tl.constexpr, GATED: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr,
                   ENTRY: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y (rows, L, R, H, P) of one piece, and the final states (sequences, H, P, N). SKIP: D (H) 1, (H, P) 2."""
    pid = tl.program_id(0).to(tl.int64)
    column = pid % (H * M)
    h, slice_ = column // M, column % M
    piece = pid // (H * M)
    row = piece // PIECES
    number = (piece % PIECES).to(tl.int32)
    lo = number * PIECE
    hi = tl.minimum(lo + PIECE, K)
    n = tl.arange(0, NB)
    p = (slice_ * PB).to(tl.int32) + tl.arange(0, PB)
    i = tl.arange(0, Q)
    i_t = i // R
    group = h // HEADS_PER_GROUP
    x_base = x_ptr + row * x_s + h * x_h
    k_base = k_ptr + row * k_s + group * k_h
    q_base = q_ptr + row * q_s + group * q_h
    y_base = y_ptr + (row * L * R * H + h) * P
    x_tile = rows_of(i, x_t, x_r, R)[:, None] + p[None, :]
    y_tile = rows_of(i, R * H * P, H * P, R)[:, None] + p[None, :]
    k_tile = rows_of(i, k_t, k_r, R)[None, :] + n[:, None]
    q_tile = rows_of(i, q_t, q_r, R)[:, None] + n[None, :]
    S = entering(initial_ptr, entry_ptr, row, piece, number, 0, h, H, n, p, P, N, NB, PB, VARLEN, INITIAL,
                 ENTRY)  # fmt: skip
    if SKIP == 1:
        D = tl.load(D_ptr + h).to(tl.float32)
    elif SKIP == 2:
        D = tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    first = row * K + lo
    next_end = tl.load(vec_ptr + (first * H + h) * (V * T) + T - 1, mask=hi > lo, other=0.0)
    for step in range(0, hi - lo):
        block = first + step
        start, count = place_in_row(block, lo + step, table_ptr, L, T, VARLEN)
        vec = vec_ptr + (block * H + h) * (V * T)
        end = next_end
        after = tl.minimum(block + 1, row * K + hi - 1)
        # one step ahead: nothing waits for it
        next_end = tl.load(vec_ptr + (after * H + h) * (V * T) + T - 1)
        if VARLEN:
            sequence = tl.load(table_ptr + block * 4 + 2)
            flags = tl.load(table_ptr + block * 4 + 3)
            if flags % 2 == 1:
                S = beginning(initial_ptr, sequence, h, H, n, p, P, N, NB, PB, INITIAL)
        inside = (i < count * R) & (i_t < T)
        q = load_tile(q_base + start * q_t + q_tile, inside[:, None], (n < N)[None, :], not FULL, N != NB)
        kT = load_tile(k_base + start * k_t + k_tile, inside[None, :], (n < N)[:, None], not FULL, N != NB)
        c = load_steps(vec, i_t, T, Q, R)
        w = load_steps(vec + T, i_t, T, Q, R)
        products = tl.dot(q, kT, input_precision=PRECISION)
        y = tl.dot(q, S.to(q.dtype), input_precision=PRECISION) * tl.exp2(c)[:, None]
        x = load_tile(x_base + start * x_t + x_tile, inside[:, None], (p < P)[None, :], not FULL, P % PB != 0)
        d = exponents(i[:, None], i[None, :], c[:, None], c[None, :], vec, T, V, R, EXACT)
        # masked before exp2: what is left is not positive, but for the rounding of the sums
        m = (
            products
            * tl.exp2(tl.where(reads(i[:, None], i[None, :], R, GATED), d, -float("inf")))
            * w[None, :]
        )
        if GATED:
            g = load_steps(vec + 2 * T, i_t, T, Q, R)
            m += tl.where(i_t[:, None] == i_t[None, :], products * g[None, :], 0.0)
        y = tl.dot(m.to(x.dtype), x, y, input_precision=PRECISION)
        if SKIP > 0:
            y += x.to(tl.float32) * D
        y_at = y_base + start * (R * H * P) + y_tile
        store_tile(y_at, y, inside[:, None], (p < P)[None, :], not FULL, P % PB != 0)
        w *= decay_to(end, c, vec, i_t, T, Q, R, V, EXACT)
        S = add_block(S, x, kT, w, end, False, PRECISION)
        if VARLEN:
            if flags // 2 == 1:
                at, mask = state_tile(final_ptr, sequence.to(tl.int64), h, H, n, p, P, N)
                tl.store(at, S, mask=mask)
    if not VARLEN:
        if number == PIECES - 1:
            at, mask = state_tile(final_ptr, row, h, H, n, p, P, N)
            tl.store(at, S, mask=mask)
