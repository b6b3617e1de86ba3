"""The gradient of the recurrence in `gpu_forward.py` (same letters), in Triton.

With dy the gradient of y, and G_out the gradient of the state that leaves a block:

    G_in  = 2^c_Q G_out + sum_i q_i (2^c_i dy_i)^T                        (`state_kernel`, REVERSE)
    z_ij  = dy_i . x_j,  E_ij = 2^(c_i - c_j) for j <= i, else 0,  K_ij = sum over heads of z_ij E_ij w_j
    dq_i  = sum over heads of 2^c_i S_in dy_i + sum_j K_ij k_j                                     (1)
    u_j   = 2^(c_Q - c_j) G_out^T k_j + sum_i (q_i . k_j) E_ij dy_i,  dx_j = w_j u_j + D dy_j         (2)
    dk_j  = sum over heads of w_j 2^(c_Q - c_j) G_out x_j + sum_i K_ij q_i,  dw_j = x_j . u_j

`pair_kernel` computes the sums over K, `state_rows_kernel` those over S and G, `value_kernel` (2); `own_kernel` all of
that where every head has a k and q of its own (Mamba-3).

GATED adds the token's own pair: g_i to K_ii, and what it gives to dx and dg. The gradient of a_t gathers every path
from before t to t or later: the paths T_ij = (q_i . k_j) E_ij w_j z_ij inside a block, those that come in with S, those
that leave with G, and 2^c_Q <S_in, G_out>, which pass through. For 16-bit inputs the first are row sums minus column
sums of one tile, which both kernels round alike, so that T_tt, which is large and crosses nothing, cancels. EXACT sums
T over later rows and earlier columns alone.

The heads of a group are summed in registers, so a program runs over the heads of (a share of) a group; what is summed
over shares is written once for each. `rows` (blocks, H M, 7, Q), float32, has for each row of a block: 0 the sum of T
over columns, or 5 (EXACT) the paths T that cross it; 1 the paths that came in with S and end there; 2 x.u, 3 its part
through G; 4 the gradient of g; 6 dy.x.
"""

from __future__ import annotations

# Triton kernels read like Python but are typed by Triton.
# mypy: ignore-errors
import triton
import triton.language as tl

from plait.ops.ssd.gpu_tiles import (
    decay_to,
    decays,
    load_steps,
    load_tile,
    place,
    reads,
    rows_of,
    store_tile,
    two_parts,
)

ROWS = 7
"""Kinds of entries in `rows`."""


@triton.jit
def rounded(t, kind: tl.constexpr):
    """float32 t rounded to `kind`, as float32: what a product of `kind` sees of it."""
    if kind == tl.bfloat16:
        # in whole numbers: a conversion there and back costs eight times as much
        bits = t.to(tl.uint32, bitcast=True)
        r = ((bits + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        r = t.to(kind).to(tl.float32)
    return r


@triton.jit
def pair_kernel(x_ptr, k_ptr, q_ptr, dy_ptr, vec_ptr, table_ptr, rows_ptr, dq_ptr, dk_ptr,
                L, K, BLOCKS, H, M, G, HEADS_PER_GROUP,
                x_s, x_t, x_r, x_h, k_s, k_t, k_r, k_h, q_s, q_t, q_r, q_h, dy_s, dy_t, dy_r, dy_h,
                Q: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                PB: tl.constexpr, NB: tl.constexpr, V: tl.constexpr, SHARE: tl.constexpr, VARLEN: tl.constexpr,
                FULL: tl.constexpr, GATED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What comes through K: its parts of dq and dk; entries 0 (what ends in the block began in it) and 5 of `rows`."""
    pid = tl.program_id(0).to(tl.int64)
    block, share_group = pid % BLOCKS, pid // BLOCKS
    group, share = share_group % G, share_group // G
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    n = tl.arange(0, NB)
    n_in = (n < N)[None, :]
    i = tl.arange(0, Q)
    i_t = i // R
    inside = (i < count * R) & (i_t < T)
    m = tl.arange(0, PB)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    q_at = q_ptr + row * q_s + start * q_t + group * q_h + (rows_of(i, q_t, q_r, R)[:, None] + n[None, :])
    k_at = k_ptr + row * k_s + start * k_t + group * k_h + (rows_of(i, k_t, k_r, R)[:, None] + n[None, :])
    q = load_tile(q_at, inside[:, None], n_in, not FULL, N != NB)
    k = load_tile(k_at, inside[:, None], n_in, not FULL, N != NB)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    lower = reads(i[:, None], i[None, :], R, GATED)
    products = tl.where(lower, products, 0.0)
    same = i_t[:, None] == i_t[None, :]
    own = tl.zeros((Q, Q), tl.float32)
    pairs = tl.zeros((Q, Q), tl.float32)
    x_at = x_ptr + row * x_s + start * x_t + (rows_of(i, x_t, x_r, R)[None, :] + m[:, None])
    dy_at = dy_ptr + row * dy_s + start * dy_t + (rows_of(i, dy_t, dy_r, R)[:, None] + m[None, :])
    first = group * HEADS_PER_GROUP * M + share * SHARE
    for step in range(0, SHARE):
        column = first + step
        h, slice_ = column // M, column % M
        p_in = slice_ * PB + m < P
        vec = vec_ptr + (block * H + h) * (V * T)
        c = load_steps(vec, i_t, T, Q, R)
        w = load_steps(vec + T, i_t, T, Q, R)
        dy = load_tile(
            dy_at + (h * dy_h + slice_ * PB), inside[:, None], p_in[None, :], not FULL, P % PB != 0
        )
        xT = load_tile(x_at + (h * x_h + slice_ * PB), inside[None, :], p_in[:, None], not FULL, P % PB != 0)
        z = tl.dot(dy, xT, input_precision=PRECISION)
        E = decays(i[:, None], i[None, :], c[:, None], c[None, :], vec, T, V, R, EXACT)
        zw = z * w[None, :]
        pairs += zw * E
        if GATED:
            g = load_steps(vec + 2 * T, i_t, T, Q, R)
            own += z * g[None, :]
        at = rows_ptr + (block * (H * M) + column) * (7 * Q)
        if EXACT:
            paths = products * E * zw
            # column t: the sum over the columns of earlier tokens; then over the rows of t and later
            earlier = (i_t[:, None] < i_t[None, :]).to(tl.float32)
            cross = tl.dot(paths, earlier, input_precision=PRECISION)
            cross = tl.sum(tl.where(i_t[:, None] >= i_t[None, :], cross, 0.0), 0)
            tl.store(at + 5 * Q + i, cross)
        else:
            # as value_kernel rounds it
            tl.store(at + i, tl.sum(rounded(products * E, kind) * zw, 1))
    pairs = tl.where(lower, pairs, 0.0)
    if GATED:
        pairs = tl.where(same, own, pairs)
    pairs = pairs.to(kind)
    dq = tl.dot(pairs, k, input_precision=PRECISION)
    dk = tl.dot(tl.trans(pairs), q, input_precision=PRECISION)
    out = (((share * (BLOCKS // K if not VARLEN else 1) + row) * L + start) * (R * G) + group) * N
    tile = rows_of(i, R * G * N, G * N, R)[:, None] + n[None, :]
    store_tile(dq_ptr + out + tile, dq, inside[:, None], n_in, not FULL, N != NB)
    store_tile(dk_ptr + out + tile, dk, inside[:, None], n_in, not FULL, N != NB)


@triton.jit
def state_rows_kernel(x_ptr, k_ptr, state_ptr, with_ptr, vec_ptr, table_ptr, rows_ptr, inner_ptr, pairs_ptr,
                      dk_ptr, L, K, BLOCKS, H, M, G, HEADS_PER_GROUP,
                      x_s, x_t, x_r, x_h, k_s, k_t, k_r, k_h,
                      Q: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                      PB: tl.constexpr, NB: tl.constexpr, V: tl.constexpr, SHARE: tl.constexpr, VARLEN: tl.constexpr,
                      FULL: tl.constexpr, QUERY: tl.constexpr, EXACT: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """dk, with `pairs`, what pair_kernel wrote of it, and entry 3 of `rows`: x meets G_out.

    QUERY: dq and entry 1: x is dy, k is q, and the states are S_in; also inner (blocks, H M, PB), what sums up to
    <S_in, G_out>, with G in with_ptr.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, share_group = pid % BLOCKS, pid // BLOCKS
    group, share = share_group % G, share_group // G
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    n = tl.arange(0, NB)
    n_in = (n < N)[None, :]
    i = tl.arange(0, Q)
    i_t = i // R
    inside = (i < count * R) & (i_t < T)
    m = tl.arange(0, PB)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    k_at = k_ptr + row * k_s + start * k_t + group * k_h + (rows_of(i, k_t, k_r, R)[:, None] + n[None, :])
    k = load_tile(k_at, inside[:, None], n_in, not FULL, N != NB)
    dk = tl.zeros((Q, NB), tl.float32)
    x_at = x_ptr + row * x_s + start * x_t + (rows_of(i, x_t, x_r, R)[:, None] + m[None, :])
    tile = block * (H * M) * (NB * PB) + (n[:, None] * PB + m[None, :])
    eye = m[:, None] == m[None, :]
    first = group * HEADS_PER_GROUP * M + share * SHARE
    next_end = tl.load(vec_ptr + (block * H + first // M) * (V * T) + T - 1)
    for step in range(0, SHARE):
        column = first + step
        h, slice_ = column // M, column % M
        p_in = slice_ * PB + m < P
        vec = vec_ptr + (block * H + h) * (V * T)
        state = tl.load(state_ptr + column * (NB * PB) + tile)
        x = load_tile(x_at + (h * x_h + slice_ * PB), inside[:, None], p_in[None, :], not FULL, P % PB != 0)
        c = load_steps(vec, i_t, T, Q, R)
        if QUERY:
            scale = tl.exp2(c)
            weight = scale
            gradient = tl.load(with_ptr + column * (NB * PB) + tile)
            if EXACT:
                inner = tl.sum(state * gradient, 0)
            else:
                # as a product, so that both tiles go where products read them
                inner = tl.sum(tl.where(eye, tl.dot(tl.trans(state), gradient), 0.0), 1)
            tl.store(inner_ptr + (block * (H * M) + column) * PB + m, inner)
        else:
            scale = decay_to(next_end, c, vec, i_t, T, Q, R, V, EXACT)
            weight = scale * load_steps(vec + T, i_t, T, Q, R)
            # one step ahead: nothing waits for it
            after = (first + tl.minimum(step + 1, SHARE - 1)) // M
            next_end = tl.load(vec_ptr + (block * H + after) * (V * T) + T - 1)
        x32 = x.to(tl.float32)
        met = tl.sum(tl.dot(k, state, input_precision=PRECISION) * x32, 1) * scale
        tl.store(rows_ptr + (block * (H * M) + column) * (7 * Q) + (1 if QUERY else 3) * Q + i, met)
        weighted = x32 * weight[:, None]
        if EXACT:
            dk = tl.dot(weighted, tl.trans(state), dk, input_precision=PRECISION)
        else:
            high, low = two_parts(weighted, kind)
            dk = tl.dot(high, tl.trans(state), dk)
            dk = tl.dot(low, tl.trans(state), dk)
    out = (((share * (BLOCKS // K if not VARLEN else 1) + row) * L + start) * (R * G) + group) * N
    tile = rows_of(i, R * G * N, G * N, R)[:, None] + n[None, :]
    dk += load_tile(pairs_ptr + out + tile, inside[:, None], n_in, not FULL, N != NB)
    store_tile(dk_ptr + out + tile, dk, inside[:, None], n_in, not FULL, N != NB)


@triton.jit
def value_kernel(x_ptr, k_ptr, q_ptr, dy_ptr, gradient_ptr, vec_ptr, D_ptr, table_ptr, rows_ptr, dx_ptr,
                 L, K, BLOCKS, H, M, G, HEADS_PER_GROUP,
                 x_s, x_t, x_r, x_h, k_s, k_t, k_r, k_h, q_s, q_t, q_r, q_h, dy_s, dy_t, dy_r, dy_h,
                 Q: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                 PB: tl.constexpr, NB: tl.constexpr, V: tl.constexpr, SHARE: tl.constexpr, VARLEN: tl.constexpr,
                 FULL: tl.constexpr, GATED: tl.constexpr, SKIP: tl.constexpr, EXACT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """dx, and entries 2, 4 and (SKIP 1) 6 of `rows`."""
    pid = tl.program_id(0).to(tl.int64)
    block, share_group = pid % BLOCKS, pid // BLOCKS
    group, share = share_group % G, share_group // G
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    n = tl.arange(0, NB)
    j = tl.arange(0, Q)
    j_t = j // R
    inside = (j < count * R) & (j_t < T)
    m = tl.arange(0, PB)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    k_at = k_ptr + row * k_s + start * k_t + group * k_h + (rows_of(j, k_t, k_r, R)[:, None] + n[None, :])
    q_at = q_ptr + row * q_s + start * q_t + group * q_h + (rows_of(j, q_t, q_r, R)[None, :] + n[:, None])
    k = load_tile(k_at, inside[:, None], (n < N)[None, :], not FULL, N != NB)
    qT = load_tile(q_at, inside[None, :], (n < N)[:, None], not FULL, N != NB)
    products = tl.dot(k, qT, input_precision=PRECISION)
    if GATED:
        same = tl.where(j_t[:, None] == j_t[None, :], products, 0.0).to(kind)
    products = tl.where(reads(j[None, :], j[:, None], R, GATED), products, 0.0)
    x_at = x_ptr + row * x_s + start * x_t + (rows_of(j, x_t, x_r, R)[:, None] + m[None, :])
    dy_at = dy_ptr + row * dy_s + start * dy_t + (rows_of(j, dy_t, dy_r, R)[:, None] + m[None, :])
    dx_at = dx_ptr + (row * L + start) * (R * H * P) + (rows_of(j, R * H * P, H * P, R)[:, None] + m[None, :])
    tile = block * (H * M) * (NB * PB) + (n[:, None] * PB + m[None, :])
    first = group * HEADS_PER_GROUP * M + share * SHARE
    next_end = tl.load(vec_ptr + (block * H + first // M) * (V * T) + T - 1)
    next_D = 0.0
    if SKIP == 1:
        next_D = tl.load(D_ptr + first // M).to(tl.float32)
    for step in range(0, SHARE):
        column = first + step
        h, slice_ = column // M, column % M
        p_in = slice_ * PB + m < P
        vec = vec_ptr + (block * H + h) * (V * T)
        gradient = tl.load(gradient_ptr + column * (NB * PB) + tile)
        dy = load_tile(
            dy_at + (h * dy_h + slice_ * PB), inside[:, None], p_in[None, :], not FULL, P % PB != 0
        )
        x = load_tile(x_at + (h * x_h + slice_ * PB), inside[:, None], p_in[None, :], not FULL, P % PB != 0)
        c = load_steps(vec, j_t, T, Q, R)
        w = load_steps(vec + T, j_t, T, Q, R)
        end = next_end
        D = next_D
        # one step ahead: nothing waits for them
        after = (first + tl.minimum(step + 1, SHARE - 1)) // M
        next_end = tl.load(vec_ptr + (block * H + after) * (V * T) + T - 1)
        if SKIP == 1:
            next_D = tl.load(D_ptr + after).to(tl.float32)
        u = tl.dot(k, gradient, input_precision=PRECISION)
        u *= decay_to(end, c, vec, j_t, T, Q, R, V, EXACT)[:, None]
        tile_ji = products * decays(j[None, :], j[:, None], c[None, :], c[:, None], vec, T, V, R, EXACT)
        u = tl.dot(tile_ji.to(kind), dy, u, input_precision=PRECISION)
        x32 = x.to(tl.float32)
        at = rows_ptr + (block * (H * M) + column) * (7 * Q) + j
        dw = tl.sum(u * x32, 1)
        tl.store(at + 2 * Q, dw)
        dx = u * w[:, None]
        if GATED:
            own = tl.dot(same, dy, input_precision=PRECISION)
            tl.store(at + 4 * Q, tl.sum(own * x32, 1))
            dx += own * load_steps(vec + 2 * T, j_t, T, Q, R)[:, None]
        if SKIP == 1:
            dy32 = dy.to(tl.float32)
            dx += dy32 * D
            if EXACT:
                skip = tl.sum(dy32 * x32, 1)
            else:
                # the same, but in the layout of u: a second copy of x and dy would cost more than a digit
                skip = tl.sum((u + dy32) * x32, 1) - dw
            tl.store(at + 6 * Q, skip)
        elif SKIP == 2:
            per_channel = tl.load(D_ptr + h * P + slice_ * PB + m, mask=p_in, other=0.0).to(tl.float32)
            dx += dy.to(tl.float32) * per_channel[None, :]
        store_tile(dx_at + (h * P + slice_ * PB), dx, inside[:, None], p_in[None, :], not FULL, P % PB != 0)


@triton.jit
def own_kernel(x_ptr, k_ptr, q_ptr, dy_ptr, state_ptr, gradient_ptr, vec_ptr, D_ptr, table_ptr, rows_ptr,
               inner_ptr, dx_ptr, dk_ptr, dq_ptr, L, K, H, x_s, x_t, x_r, x_h, k_s, k_t, k_r, k_h,
               q_s, q_t, q_r, q_h, dy_s, dy_t, dy_r, dy_h,
               Q: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
               PB: tl.constexpr, NB: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr,
               FULL: tl.constexpr, GATED: tl.constexpr, SKIP: tl.constexpr, EXACT: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """All of that for heads with keys and queries of their own: one block of one head, nothing to sum over heads."""
    pid = tl.program_id(0).to(tl.int64)
    h, block = pid % H, pid // H
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    n = tl.arange(0, NB)
    n_in = (n < N)[None, :]
    i = tl.arange(0, Q)
    i_t = i // R
    inside = (i < count * R) & (i_t < T)
    m = tl.arange(0, PB)
    m_in = (m < P)[None, :]
    kind: tl.constexpr = x_ptr.dtype.element_ty
    vec = vec_ptr + pid * (V * T)
    c = load_steps(vec, i_t, T, Q, R)
    w = load_steps(vec + T, i_t, T, Q, R)
    end = tl.load(vec + T - 1)
    x_at = x_ptr + row * x_s + start * x_t + h * x_h + (rows_of(i, x_t, x_r, R)[:, None] + m[None, :])
    dy_at = dy_ptr + row * dy_s + start * dy_t + h * dy_h + (rows_of(i, dy_t, dy_r, R)[:, None] + m[None, :])
    q_at = q_ptr + row * q_s + start * q_t + h * q_h + (rows_of(i, q_t, q_r, R)[:, None] + n[None, :])
    k_at = k_ptr + row * k_s + start * k_t + h * k_h + (rows_of(i, k_t, k_r, R)[:, None] + n[None, :])
    q = load_tile(q_at, inside[:, None], n_in, not FULL, N != NB)
    k = load_tile(k_at, inside[:, None], n_in, not FULL, N != NB)
    x = load_tile(x_at, inside[:, None], m_in, not FULL, P != PB)
    dy = load_tile(dy_at, inside[:, None], m_in, not FULL, P != PB)
    states = pid * (NB * PB) + (n[:, None] * PB + m[None, :])
    state = tl.load(state_ptr + states)
    gradient = tl.load(gradient_ptr + states)
    rows = rows_ptr + pid * (7 * Q) + i

    lower = reads(i[:, None], i[None, :], R, GATED)
    same = i_t[:, None] == i_t[None, :]
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    z = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
    E = decays(i[:, None], i[None, :], c[:, None], c[None, :], vec, T, V, R, EXACT)
    E = tl.where(lower, E, 0.0)
    zw = z * w[None, :]
    pairs = zw * E
    tile = products * E
    if EXACT:
        earlier = (i_t[:, None] < i_t[None, :]).to(tl.float32)
        cross = tl.dot(tile * zw, earlier, input_precision=PRECISION)
        tl.store(rows + 5 * Q, tl.sum(tl.where(i_t[:, None] >= i_t[None, :], cross, 0.0), 0))
    else:
        tl.store(rows, tl.sum(rounded(tile, kind) * zw, 1))
    if GATED:
        g = load_steps(vec + 2 * T, i_t, T, Q, R)
        pairs = tl.where(same, z * g[None, :], pairs)
        own = tl.where(same, products, 0.0).to(kind)
    pairs = pairs.to(kind)
    tile = tile.to(kind)

    if EXACT:
        inner = tl.sum(state * gradient, 0)
    else:
        inner = tl.dot(tl.trans(state), gradient)
        inner = tl.sum(tl.where(m[:, None] == m[None, :], inner, 0.0), 1)
    tl.store(inner_ptr + pid * PB + m, inner)

    e = tl.exp2(c)
    dy32 = dy.to(tl.float32)
    tl.store(rows + Q, tl.sum(tl.dot(q, state, input_precision=PRECISION) * dy32, 1) * e)
    dq = tl.dot(dy, tl.trans(state), input_precision=PRECISION) * e[:, None]
    dq = tl.dot(pairs, k, dq, input_precision=PRECISION)
    to = ((row * L + start) * (R * H) + h) * N + (rows_of(i, R * H * N, H * N, R)[:, None] + n[None, :])
    store_tile(dq_ptr + to, dq, inside[:, None], n_in, not FULL, N != NB)

    leaves = decay_to(end, c, vec, i_t, T, Q, R, V, EXACT)
    x32 = x.to(tl.float32)
    u = tl.dot(k, gradient, input_precision=PRECISION) * leaves[:, None]
    tl.store(rows + 3 * Q, tl.sum(u * x32, 1))
    dk = tl.dot(x, tl.trans(gradient), input_precision=PRECISION) * (w * leaves)[:, None]
    dk = tl.dot(tl.trans(pairs), q, dk, input_precision=PRECISION)
    store_tile(dk_ptr + to, dk, inside[:, None], n_in, not FULL, N != NB)

    u = tl.dot(tl.trans(tile), dy, u, input_precision=PRECISION)
    tl.store(rows + 2 * Q, tl.sum(u * x32, 1))
    dx = u * w[:, None]
    if GATED:
        of_own = tl.dot(tl.trans(own), dy, input_precision=PRECISION)
        tl.store(rows + 4 * Q, tl.sum(of_own * x32, 1))
        dx += of_own * g[:, None]
    if SKIP == 1:
        dx += dy32 * tl.load(D_ptr + h).to(tl.float32)
        tl.store(rows + 6 * Q, tl.sum(dy32 * x32, 1))
    elif SKIP == 2:
        dx += dy32 * tl.load(D_ptr + h * P + m, mask=m < P, other=0.0).to(tl.float32)[None, :]
    dx_at = (
        dx_ptr
        + ((row * L + start) * (R * H) + h) * P
        + (rows_of(i, R * H * P, H * P, R)[:, None] + m[None, :])
    )
    store_tile(dx_at, dx, inside[:, None], m_in, not FULL, P != PB)


@triton.jit
def shares_kernel(parts_ptr, others_ptr, to_ptr, other_ptr, SIZE, SHARES, BLOCK: tl.constexpr):
    """to (SIZE) = parts (SHARES, SIZE) summed over the shares, and other = others likewise."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    if tl.program_id(1) == 0:
        for share in range(0, SHARES):
            total += tl.load(parts_ptr + tl.cast(share, tl.int64) * SIZE + o, mask=mask, other=0.0)
        tl.store(to_ptr + o, total.to(to_ptr.dtype.element_ty), mask=mask)
    else:
        for share in range(0, SHARES):
            total += tl.load(others_ptr + tl.cast(share, tl.int64) * SIZE + o, mask=mask, other=0.0)
        tl.store(other_ptr + o, total.to(other_ptr.dtype.element_ty), mask=mask)
