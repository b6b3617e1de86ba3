"""What the kernels of `gpu_forward.py` and `gpu_backward.py` share (same letters): where blocks lie, tiles, decays."""

from __future__ import annotations

# Triton kernels read like Python but are typed by Triton.
# mypy: ignore-errors
import triton
import triton.language as tl


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
def two_parts(t, kind: tl.constexpr):
    """float32 t as a sum of two numbers of a 16-bit type, with twice its digits."""
    if kind == tl.bfloat16:
        high = (t.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        high = t.to(kind).to(tl.float32)
    return high.to(kind), (t - high).to(kind)
