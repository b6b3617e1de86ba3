"""Mamba-2's and Mamba-3's recurrence on a GPU: what both directions share, and the forward pass, in Triton.

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

from plait.ops.triton_support import LOG2E, softplus

# 2^-160 is 0 in float32: a stronger single step changes nothing but would use up the sum's digits.
FLOOR = tl.constexpr(-160.0)
# What has decayed by 2^-60 is nothing beside what has not.
FAINT = tl.constexpr(-60.0)


@triton.jit
def table_kernel(cu_ptr, table_ptr, S, C, T, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """Fill `table` for cu_seqlens (S+1,): blocks of T tokens, in order; those beyond the last hold no token."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.zeros((BLOCK,), tl.int32)
    first = tl.zeros((BLOCK,), tl.int32)
    done = 0
    for at in range(0, S, SEQUENCES):
        s = at + tl.arange(0, SEQUENCES)
        begin = tl.load(cu_ptr + s, mask=s < S, other=0).to(tl.int32)
        end = tl.load(cu_ptr + s + 1, mask=s < S, other=0).to(tl.int32)
        blocks = (end - begin + T - 1) // T
        until = done + tl.cumsum(blocks, 0)
        passed = (until[None, :] <= c[:, None]) & (s < S)[None, :]
        owner += tl.sum(passed.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(passed, until[None, :], 0), 1))
        done += tl.sum(blocks, 0)
    exists = owner < S
    begin = tl.load(cu_ptr + owner, mask=exists, other=0).to(tl.int32)
    end = tl.load(cu_ptr + owner + 1, mask=exists, other=0).to(tl.int32)
    start = begin + (c - first) * T
    count = tl.where(exists, tl.minimum(end - start, T), 0)
    flags = tl.where(exists, (c == first).to(tl.int32) + 2 * (start + T >= end).to(tl.int32), 0)
    inside = c < C
    tl.store(table_ptr + c * 4, tl.where(exists, start, 0), mask=inside)
    tl.store(table_ptr + c * 4 + 1, count, mask=inside)
    tl.store(table_ptr + c * 4 + 2, tl.where(exists, owner, 0), mask=inside)
    tl.store(table_ptr + c * 4 + 3, flags, mask=inside)


@triton.jit
def place(block, table_ptr, L, K, T, VARLEN: tl.constexpr):
    """Row, first token and number of tokens of a block."""
    if VARLEN:
        row = block * 0
        start = tl.load(table_ptr + block * 4)
        count = tl.load(table_ptr + block * 4 + 1)
    else:
        row = block // K
        start = (block % K) * T
        count = tl.minimum(L - start, T)
    return row.to(tl.int64), start.to(tl.int64), count


@triton.jit
def place_in_row(block, k, table_ptr, L, T, VARLEN: tl.constexpr):
    """First token and number of tokens of a block, number k of its row."""
    if VARLEN:
        start = tl.load(table_ptr + block * 4)
        count = tl.load(table_ptr + block * 4 + 1)
    else:
        start = k * T
        count = tl.minimum(L - start, T)
    return start.to(tl.int64), count


@triton.jit
def steps_of(dt_ptr, bias_ptr, row, start, t, h, inside, h_in, dt_s, dt_t, dt_h, low, high,
             SOFTPLUS: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """dt before and after softplus and clamp, (T, heads); 0 where `inside` is false."""
    at = dt_ptr + row * dt_s + start * dt_t
    v = tl.load(at + t[:, None] * dt_t + h[None, :] * dt_h, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias_ptr + h, mask=h_in, other=0.0).to(tl.float32)[None, :]
    u = softplus(v) if SOFTPLUS else v
    dt = tl.clamp(u, low, high, propagate_nan=tl.PropagateNan.ALL)
    return v, u, tl.where(inside, dt, 0.0)


@triton.jit
def store_vec(vec_ptr, block, h, h_in, H, a, w, g, T: tl.constexpr, TOKENS: tl.constexpr, V: tl.constexpr,
              GATED: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write a block's entries of `vec` (TOKENS: T or the next power of two); a in base 2, float64 if EXACT."""
    t = tl.arange(0, TOKENS)
    at = vec_ptr + ((block.to(tl.int64) * H + h)[None, :] * V) * T + t[:, None]
    mask = h_in[None, :] & (t < T)[:, None]
    a = tl.maximum(a, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    c = tl.cumsum(a, 0)
    high = c.to(tl.float32)
    tl.store(at, high, mask=mask)
    tl.store(at + T, w, mask=mask)
    if GATED:
        tl.store(at + 2 * T, g, mask=mask)
    if EXACT:
        tl.store(at + (V - 1) * T, (c - high).to(tl.float32), mask=mask)


@triton.jit
def steps_kernel(dt_ptr, bias_ptr, A_ptr, vec_ptr, table_ptr, L, K, H, dt_s, dt_t, dt_h, low, high,
                 T: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
                 VARLEN: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Mamba-2's `vec` for HEADS heads of one block: dt = clamp(softplus(dt + bias)), a = dt A."""
    block = tl.program_id(0)
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    t = tl.arange(0, T)
    h_in = h < H
    inside = (t < count)[:, None] & h_in[None, :]
    _, _, dt = steps_of(dt_ptr, bias_ptr, row, start, t, h, inside, h_in, dt_s, dt_t, dt_h, low, high,
                        SOFTPLUS, BIAS)  # fmt: skip
    A = tl.load(A_ptr + h, mask=h_in, other=0.0).to(tl.float32)[None, :]
    if EXACT:
        a = dt.to(tl.float64) * A.to(tl.float64) * 1.4426950408889634
    else:
        a = dt * (A * LOG2E)
    store_vec(vec_ptr, block, h, h_in, H, a, dt, dt, T, T, 3 if EXACT else 2, False, EXACT)


@triton.jit
def gates_kernel(a_ptr, dt_ptr, lam_ptr, vec_ptr, table_ptr, L, K, H, a_s, a_t, a_h, dt_s, dt_t, dt_h,
                 lam_s, lam_t, lam_h, T: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
                 VARLEN: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Mamba-3's `vec`: g = dt lam, w = g + dt (1 - lam) of the sequence's next token, if it has one."""
    block = tl.program_id(0).to(tl.int64)
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    goes_on = (start + T < L).to(tl.int32)
    if VARLEN:
        goes_on = 1 - tl.load(table_ptr + block * 4 + 3) // 2
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    t = tl.arange(0, TOKENS)
    h_in = h < H
    inside = (t < count)[:, None] & h_in[None, :]
    following = inside & (t + 1 < count + goes_on)[:, None]
    dt_at = dt_ptr + row * dt_s + start * dt_t + t[:, None] * dt_t + h[None, :] * dt_h
    lam_at = lam_ptr + row * lam_s + start * lam_t + t[:, None] * lam_t + h[None, :] * lam_h
    g = tl.load(dt_at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(lam_at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(dt_at + dt_t, mask=following, other=0.0).to(tl.float32)
    w = g + w * (1.0 - tl.load(lam_at + lam_t, mask=following, other=0.0).to(tl.float32))
    a_at = a_ptr + row * a_s + start * a_t + t[:, None] * a_t + h[None, :] * a_h
    a = tl.load(a_at, mask=inside, other=0.0).to(tl.float32)
    if EXACT:
        a = a.to(tl.float64) * 1.4426950408889634
    else:
        a = a * LOG2E
    store_vec(vec_ptr, block, h, h_in, H, a, w, g, T, TOKENS, 4 if EXACT else 3, True, EXACT)


@triton.jit
def state_tile(ptr, i, h, H, n, p, P: tl.constexpr, N: tl.constexpr):
    """Pointers to, and mask of, rows n and columns p of head h's state in a tensor (i, H, P, N)."""
    at = ptr + (i * H + h) * (P * N)
    return at + (p[None, :] * N + n[:, None]), (n < N)[:, None] & (p < P)[None, :]


@triton.jit
def rows_of(i, s_t, s_r, R: tl.constexpr):
    """Offsets of rows i (token i // R, rank i % R) in a block."""
    if R == 1:
        at = i * s_t
    else:
        at = (i // R) * s_t + (i % R) * s_r
    return at


@triton.jit
def load_tile(at, row_in, channel_in, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The tile at pointers `at`, 0 outside; ROWS, CHANNELS: whether row_in, channel_in leave any out."""
    if ROWS and CHANNELS:
        tile = tl.load(at, mask=row_in & channel_in, other=0.0)
    elif ROWS:
        tile = tl.load(at, mask=row_in, other=0.0)
    elif CHANNELS:
        tile = tl.load(at, mask=channel_in, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(at, tile, row_in, channel_in, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write what `load_tile` reads."""
    value = tile.to(at.dtype.element_ty)
    if ROWS and CHANNELS:
        tl.store(at, value, mask=row_in & channel_in)
    elif ROWS:
        tl.store(at, value, mask=row_in)
    elif CHANNELS:
        tl.store(at, value, mask=channel_in)
    else:
        tl.store(at, value)


@triton.jit
def load_steps(ptr, i_t, T: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    """One of the T-vectors of `vec` for the rows of a block; 0 in rows beyond its tokens."""
    if T * R == Q:
        v = tl.load(ptr + i_t)
    else:
        v = tl.load(ptr + i_t, mask=i_t < T, other=0.0)
    return v


@triton.jit
def decay_to(end, c, vec, i_t, T: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
             EXACT: tl.constexpr):  # fmt: skip
    """2^(c_Q - c_i)."""
    d = end - c
    if EXACT:
        d += tl.load(vec + V * T - 1) - load_steps(vec + (V - 1) * T, i_t, T, Q, R)
    return tl.exp2(tl.minimum(d, 0.0))


@triton.jit
def reads(i, j, R: tl.constexpr, STRICT: tl.constexpr):
    """Whether row i may read row j (STRICT: only of earlier tokens)."""
    return i // R > j // R if STRICT else i // R >= j // R


@triton.jit
def exponents(i, j, c_i, c_j, vec, T: tl.constexpr, V: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):
    """c_i - c_j; i and c_i, j and c_j are a column and a row: (I, 1) and (1, J), or the other way round."""
    d = c_i - c_j
    if EXACT:
        low = vec + (V - 1) * T
        d += tl.load(low + i // R, mask=i // R < T, other=0.0) - tl.load(
            low + j // R, mask=j // R < T, other=0.0
        )
    return d


@triton.jit
def decays(i, j, c_i, c_j, vec, T: tl.constexpr, V: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):
    """2^(c_i - c_j), but at most 1: what row i may not read, where that is the result, is for the caller to mask."""
    return tl.exp2(tl.minimum(exponents(i, j, c_i, c_j, vec, T, V, R, EXACT), 0.0))


@triton.jit
def add_block(S, x, kT, w, end, PRECISION: tl.constexpr):
    """2^end S + k^T (w x): the state after a block."""
    scaled = (x.to(tl.float32) * w[:, None]).to(x.dtype)
    return tl.dot(kT, scaled, S * tl.exp2(end), input_precision=PRECISION)


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
                 STORE: tl.constexpr, FINAL: tl.constexpr, PIECE_FINAL: tl.constexpr, EXACT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Walk the states of one piece. out (blocks, H M, NB, PB): the state that enters each block.

    REVERSE: from the last block to the first, for gradients: x is dy, k is q, and a row is weighted by 2^c_i.
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
        S = add_block(S, x, kT, w, end, PRECISION)
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
        S = add_block(S, x, kT, w, end, PRECISION)
        if VARLEN:
            if flags // 2 == 1:
                at, mask = state_tile(final_ptr, sequence.to(tl.int64), h, H, n, p, P, N)
                tl.store(at, S, mask=mask)
    if not VARLEN:
        if number == PIECES - 1:
            at, mask = state_tile(final_ptr, row, h, H, n, p, P, N)
            tl.store(at, S, mask=mask)
