"""The narrow numbers of `gpu_forward.py` (same letters), one a token and head: steps and decays, and their gradients.

`vec` is written by `steps_kernel` (Mamba-2) or `gates_kernel` (Mamba-3). The gradient of a_t gathers every path from
before t to t or later: the paths T_ij = (q_i . k_j) E_ij w_j z_ij inside a block, those that come in with S, those that
leave with G, and 2^c_Q <S_in, G_out>, which pass through. `gpu_backward.py` says what they are, and what `rows` and
`inner` hold.
"""

from __future__ import annotations

# Triton kernels read like Python but are typed by Triton.
# mypy: ignore-errors
import triton
import triton.language as tl

from plait.ops.ssd.gpu_tiles import place
from plait.ops.triton_support import LOG2E, softplus

# 2^-160 is 0 in float32: a stronger single step changes nothing but would use up the sum's digits.
FLOOR = tl.constexpr(-160.0)


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
def rows_sum(rows_ptr, block, h, h_in, H, M, t, entry, T: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    """One kind of `rows` summed over the slices of each head and the ranks of token t: (heads, t)."""
    total = tl.zeros((h.shape[0], t.shape[0]), tl.float32)
    mask = h_in[:, None] & ((t >= 0) & (t < T))[None, :]
    for slice_ in range(0, M):
        at = rows_ptr + ((block * H + h)[:, None] * M + slice_) * (7 * Q) + entry * Q
        for r in tl.static_range(R):
            total += tl.load(at + (t * R + r)[None, :], mask=mask, other=0.0)
    return total


@triton.jit
def path_sums(rows_ptr, inner_ptr, vec_ptr, block, h, h_in, H, M,
              T: tl.constexpr, TOKENS: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, PB: tl.constexpr,
              V: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """The gradients of a and of w, (heads, TOKENS). Sums run from their small end: none is a difference of two."""
    t = tl.arange(0, TOKENS)
    dw = rows_sum(rows_ptr, block, h, h_in, H, M, t, 2, T, Q, R)
    ends = rows_sum(rows_ptr, block, h, h_in, H, M, t, 1, T, Q, R)
    inner = tl.zeros((h.shape[0],), tl.float32)
    m = tl.arange(0, PB)
    for slice_ in range(0, M):
        at = inner_ptr + ((block * H + h)[:, None] * M + slice_) * PB + m[None, :]
        inner += tl.sum(tl.load(at, mask=h_in[:, None], other=0.0), 1)
    vec = vec_ptr + (block * H + h) * (V * T)
    through = inner * tl.exp2(tl.load(vec + T - 1, mask=h_in, other=0.0))
    # what leaves through G from the tokens before t
    before = rows_sum(rows_ptr, block, h, h_in, H, M, t - 1, 3, T, Q, R)
    mask = h_in[:, None] & ((t > 0) & (t <= T))[None, :]
    before *= tl.load(vec[:, None] + T + t[None, :] - 1, mask=mask, other=0.0)
    da = tl.cumsum(before, 1) + through[:, None]
    if EXACT:
        da += rows_sum(rows_ptr, block, h, h_in, H, M, t, 5, T, Q, R) / R
    else:
        w = tl.load(vec[:, None] + T + t[None, :], mask=h_in[:, None] & (t < T)[None, :], other=0.0)
        leaving = rows_sum(rows_ptr, block, h, h_in, H, M, t, 3, T, Q, R)
        ends += rows_sum(rows_ptr, block, h, h_in, H, M, t, 0, T, Q, R) - (dw - leaving) * w
    da += tl.cumsum(ends, 1, reverse=True)
    return da, dw


@triton.jit
def steps_gradient_kernel(rows_ptr, inner_ptr, vec_ptr, dt_ptr, bias_ptr, A_ptr, table_ptr, ddt_ptr, sums_ptr,
                          L, K, BLOCKS, H, M, dt_s, dt_t, dt_h, low, high,
                          Q: tl.constexpr, PB: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr,
                          SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, VARLEN: tl.constexpr,
                          SKIP: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """ddt (rows, L, H), and for each block the parts (3, blocks, H) of the gradients of A, dt_bias and D (H)."""
    block = tl.program_id(0).to(tl.int64)
    row, start, count = place(block, table_ptr, L, K, Q, VARLEN)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    h_in = h < H
    t = tl.arange(0, Q)
    inside = (t < count)[:, None] & h_in[None, :]
    v, u, dt = steps_of(dt_ptr, bias_ptr, row, start, t, h, inside, h_in, dt_s, dt_t, dt_h, low, high,
                        SOFTPLUS, BIAS)  # fmt: skip
    dt = tl.trans(dt)
    da, dw = path_sums(rows_ptr, inner_ptr, vec_ptr, block, h, h_in, H, M, Q, Q, Q, 1, PB, V, EXACT)
    A = tl.load(A_ptr + h, mask=h_in, other=0.0).to(tl.float32)
    ddt = A[:, None] * da + dw
    u = tl.trans(u)
    # where the clamp holds, dt does not move
    ddt = tl.where((u >= low) & (u <= high), ddt, 0.0)
    if SOFTPLUS:
        ddt = ddt / (1.0 + tl.exp(-tl.trans(v)))
    inside = tl.trans(inside)
    ddt = tl.where(inside, ddt, 0.0)
    at = ddt_ptr + (row * L + start) * H + t[None, :] * H + h[:, None]
    tl.store(at, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
    at = sums_ptr + block * H + h
    tl.store(at, tl.sum(da * dt, 1), mask=h_in)
    tl.store(at + BLOCKS * H, tl.sum(ddt, 1), mask=h_in)
    if SKIP == 1:
        skip = rows_sum(rows_ptr, block, h, h_in, H, M, t, 6, Q, Q, 1)
        tl.store(at + 2 * BLOCKS * H, tl.sum(skip, 1), mask=h_in)


@triton.jit
def gates_gradient_kernel(rows_ptr, inner_ptr, vec_ptr, table_ptr, da_ptr, dw_ptr, dg_ptr, sums_ptr,
                          L, K, H, M, Q: tl.constexpr, T: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr,
                          PB: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, VARLEN: tl.constexpr,
                          SKIP: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """The gradients of a, w and g (rows, L, H), and for each block the part (blocks, H) of that of D (H)."""
    block = tl.program_id(0).to(tl.int64)
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    h_in = h < H
    t = tl.arange(0, TOKENS)
    da, dw = path_sums(rows_ptr, inner_ptr, vec_ptr, block, h, h_in, H, M, T, TOKENS, Q, R, PB, V, EXACT)
    dg = rows_sum(rows_ptr, block, h, h_in, H, M, t, 4, T, Q, R)
    inside = h_in[:, None] & (t < count)[None, :]
    to = (row * L + start) * H + t[None, :] * H + h[:, None]
    tl.store(da_ptr + to, da.to(da_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + to, dw, mask=inside)
    tl.store(dg_ptr + to, dg, mask=inside)
    if SKIP == 1:
        skip = rows_sum(rows_ptr, block, h, h_in, H, M, t, 6, T, Q, R)
        tl.store(sums_ptr + block * H + h, tl.sum(skip, 1), mask=h_in)


@triton.jit
def gates_input_kernel(dw_ptr, dg_ptr, dt_ptr, lam_ptr, table_ptr, ddt_ptr, dlam_ptr, L, K, H,
                       dt_s, dt_t, dt_h, lam_s, lam_t, lam_h,
                       T: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, VARLEN: tl.constexpr):  # fmt: skip
    """The gradients of dt and lam (rows, L, H) from those of g = dt lam and of w = g + the next dt (1 - lam)."""
    block = tl.program_id(0).to(tl.int64)
    row, start, count = place(block, table_ptr, L, K, T, VARLEN)
    continues = (start > 0).to(tl.int32)
    if VARLEN:
        continues = 1 - tl.load(table_ptr + block * 4 + 3) % 2
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    t = tl.arange(0, TOKENS)
    inside = (t < count)[:, None] & (h < H)[None, :]
    dt_at = dt_ptr + row * dt_s + start * dt_t + t[:, None] * dt_t + h[None, :] * dt_h
    lam_at = lam_ptr + row * lam_s + start * lam_t + t[:, None] * lam_t + h[None, :] * lam_h
    dt = tl.load(dt_at, mask=inside, other=0.0).to(tl.float32)
    lam = tl.load(lam_at, mask=inside, other=0.0).to(tl.float32)
    at = (row * L + start) * H + t[:, None] * H + h[None, :]
    own = tl.load(dg_ptr + at, mask=inside, other=0.0) + tl.load(dw_ptr + at, mask=inside, other=0.0)
    follows = inside & (t + continues > 0)[:, None]
    before = tl.load(dw_ptr + at - H, mask=follows, other=0.0)
    ddt = lam * own + (1.0 - lam) * before
    tl.store(ddt_ptr + at, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
    tl.store(dlam_ptr + at, (dt * (own - before)).to(dlam_ptr.dtype.element_ty), mask=inside)


@triton.jit
def skip_kernel(x_ptr, dy_ptr, sums_ptr, L, K, H, x_s, x_t, x_r, x_h, dy_s, dy_t, dy_r, dy_h,
                R: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Parts (blocks, H, P) of the gradient of D (H, P): x dy summed over T tokens."""
    block = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    row, start = block // K, (block % K) * T
    t = tl.arange(0, T)
    p = tl.arange(0, PB)
    mask = (start + t < L)[:, None] & (p < P)[None, :]
    total = tl.zeros((PB,), tl.float32)
    for r in tl.static_range(R):
        x_at = x_ptr + row * x_s + start * x_t + r * x_r + h * x_h
        dy_at = dy_ptr + row * dy_s + start * dy_t + r * dy_r + h * dy_h
        x = tl.load(x_at + t[:, None] * x_t + p[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_at + t[:, None] * dy_t + p[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * dy, 0)
    tl.store(sums_ptr + (block * H + h) * P + p, total, mask=p < P)
