"""The gradient of the selective scan in Triton: the sweep back through time, and the sums over programs.

    g_t = C_t dy_t + a_{t+1} g_{t+1};  p_t = a_t h_{t-1};   dx = dt B.g + D dy;   d(dt) = x B.g + A.(g p)
    dA = sum_t dt g p;   dB_t = sum_e g dt x;   dC_t = sum_e h dy          (the gradient of arXiv 2312.00752, eq. 2)

`w` is what a tile passes back, a_t g_t of its first token. States before each tile come from the sweep forward
(gpu_forward.py, AGAIN); within a tile they and the decays are computed again. dB and dC need a sum over channels,
which lie across the lanes: a lane adds its two, and a product with ones on the tensor cores adds the lanes. Every
program writes its own part; `finish_kernel` adds them in a fixed order, so that two runs are equal bit for bit.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton knows no starred tuples, and decides an `if` on a constexpr before it looks inside.
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl

from plait.ops.selective_scan.gpu_forward import SIZES
from plait.ops.selective_scan.gpu_tiles import (
    follow,
    inside_item,
    load_tile,
    locate,
    pack,
    sigmoid,
    step_size,
    store_tile,
    tiles_of,
    touch,
    touch_packed,
    unpack,
    vector,
)
from plait.ops.triton_chunks import first_beyond
from plait.ops.triton_support import LN2


@triton.jit
def add_lanes(x, EXACT: tl.constexpr):
    """[R, V] -> [V, 8], its sum over the lanes in every column; EXACT: to float32 precision, else to 2^-10."""
    ones = tl.full([x.shape[0], 8], 1.0, tl.float32)
    if EXACT:
        # the tensor cores read the upper 19 bits of a float32; what is left over goes in a second product
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(tl.trans(high), ones, input_precision="tf32")
        total = tl.dot(tl.trans(x - high), ones, total, input_precision="tf32")
    else:
        total = tl.dot(tl.trans(x), ones, input_precision="tf32")
    return total


@triton.jit
def pairs(x):
    """[R, 8] -> [32, 8]: neighbouring channels, which are in one thread, added."""
    if x.shape[0] == 64:
        return tl.sum(tl.reshape(x, [32, 2, 8]), 1)
    else:
        return x


@triton.jit
def retreat(dt, du, dy, s1, s2, h, w, da, rate, bc_p):
    """A state back through a tile: new s1 and s2 [R, 8], w and da (R), and the summands of dB and dC [R, 8].

    s1 = sum B.g and s2 = sum A2.(g p) over states; h (R): the state before the tile; rate (R): A2, A in units of log 2.
    """
    steps = tl.arange(0, 8)
    b = tl.load(bc_p + steps)[None, :]
    c = tl.load(bc_p + 8 + steps)[None, :]
    decay = unpack(tl.exp2(dt * rate[:, None]))
    inputs = unpack(du * b)
    reads = unpack(dy * c)
    before = ()
    states = ()
    for j in tl.static_range(8):
        kept = decay[j] * h
        h = kept + inputs[j]
        before = before + (kept,)
        states = states + (h,)
    grads = ()
    for j in tl.static_range(8):
        grad = reads[7 - j] + w
        w = decay[7 - j] * grad
        grads = (grad,) + grads
    g = pack(grads)
    through = g * pack(before)
    return (
        s1 + g * b,
        s2 + through * rate[:, None],
        w,
        da + tl.sum(through * dt, 1),
        g * du,
        pack(states) * dy,
    )


@triton.jit(do_not_specialize=SIZES)
def reverse_kernel(
    x_p,
    dt_p,
    z_p,
    g_p,
    bc_p,
    a_p,
    d_p,
    bias_p,
    kept_p,
    final_p,
    bounds,
    back_p,
    sums_p,
    w_p,
    da_p,
    vectors_p,
    parts_p,
    dx_p,
    ddt_p,
    initial_p,
    x_r,
    dt_r,
    z_r,
    g_r,
    out_r,
    length,
    tiles,
    sequences,
    segment,
    segments,
    slots,
    X_T: tl.constexpr,
    DT_T: tl.constexpr,
    Z_T: tl.constexpr,
    G_T: tl.constexpr,
    OUT_T: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    FINAL: tl.constexpr,
    INITIAL: tl.constexpr,
    SEGMENTED: tl.constexpr,
    VARLEN: tl.constexpr,
    EDGE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A program: R channels of an item, from its last tile to its first, U states at a time (1 or 2).

    Writes dx, ddt, the initial state's gradient, and its parts of the other gradients: of A in da_p [items, N,
    channels], of D and dt_bias in vectors_p [items, 2, channels], of B and C in parts_p [blocks of a group, slots,
    groups, N / U, tokens, 2, U].
    """
    per_group: tl.constexpr = (CHANNELS // GROUPS + R - 1) // R
    AREA: tl.constexpr = PADDED * CHANNELS
    WIDE: tl.constexpr = 16 * U
    block = tl.program_id(0) % (GROUPS * per_group)
    item = tl.program_id(0) // (GROUPS * per_group)
    group = block // per_group
    first_channel = group * (CHANNELS // GROUPS) + block % per_group * R
    channel = first_channel + tl.arange(0, R)
    limit = (group + 1) * (CHANNELS // GROUPS)
    live = channel < limit
    sequence, row, begin, end, first, last = locate(
        item, bounds, sequences, length, segment, segments, VARLEN
    )
    tile_0, tile_1 = tiles_of(begin, end)
    row = tl.cast(row, tl.int64)
    sequence = tl.cast(sequence, tl.int64)
    x_p += row * x_r
    dt_p += row * dt_r
    z_p += row * z_r
    g_p += row * g_r
    dx_p += row * out_r + channel
    ddt_p += row * out_r + channel
    w_p += tl.cast(item, tl.int64) * AREA + channel
    da_p += tl.cast(item, tl.int64) * AREA + channel
    slot = row * tiles + tile_1 - 1
    if VARLEN:
        slot += item
    bc_p += (slot * GROUPS + group) * (PADDED * 16)
    kept_p += slot * AREA
    parts_p += ((tl.cast(block % per_group, tl.int64) * slots + slot) * GROUPS + group) * (PADDED * 16)
    bias = vector(bias_p, channel, live, BIAS)
    skip = vector(d_p, channel, live, SKIP)
    dskip = vector(d_p, channel, live, False)
    dbias = vector(d_p, channel, live, False)
    # what comes back from the items after this one
    for m in range(PADDED):
        later = vector(d_p, channel, live, False)
        tl.store(da_p + m * CHANNELS, later, mask=live)
        if FINAL:
            at = final_p + sequence * (CHANNELS * STATES) + channel * STATES + m
            later = tl.load(at, mask=live & (m < STATES), other=0.0).to(tl.float32)
        if SEGMENTED:
            rate0 = tl.load(a_p + m * CHANNELS + channel, mask=live, other=0.0)
            for back in tl.range(0, last - item, loop_unroll_factor=4):
                later = follow(later, rate0, back_p, sums_p, last - back, m, channel, live, CHANNELS, PADDED)
        tl.store(w_p + m * CHANNELS, later, mask=live)
    seen = vector(d_p, channel, live, False)
    column = tl.arange(0, 8)[None, :]
    entry = tl.arange(0, WIDE)[:, None]
    for back_tile in range(tile_1 - tile_0):
        tl.debug_barrier()  # states written before are read by the lanes that need them now
        t0 = (tile_1 - 1 - back_tile) * 8
        inside = inside_item(t0, begin, end)
        seen = touch(x_p + first_channel, seen, channel, limit, t0 - 8, X_T, begin, end)
        seen = touch(dt_p + first_channel, seen, channel, limit, t0 - 8, DT_T, begin, end)
        seen = touch(g_p + first_channel, seen, channel, limit, t0 - 8, G_T, begin, end)
        if GATE:
            seen = touch(z_p + first_channel, seen, channel, limit, t0 - 8, Z_T, begin, end)
        more = tile_1 - tile_0 - 1 - back_tile
        seen = touch_packed(bc_p - GROUPS * PADDED * 16, seen, PADDED, more)
        lane = tl.arange(0, R)
        for part in tl.static_range((PADDED + 7) // 8):
            state = part * 8 + lane // (R // 8)
            sector = first_channel + lane % (R // 8) * 8
            wanted = (state < PADDED) & (sector < limit) & (lane * 0 + more > 0)
            ahead = tl.load(kept_p - AREA + state * CHANNELS + sector, mask=wanted, other=0.0)
            seen = tl.maximum(seen, ahead)
        x = load_tile(x_p + channel, t0, X_T, live, begin, end, EDGE)
        dt = step_size(
            load_tile(dt_p + channel, t0, DT_T, live, begin, end, EDGE), bias, inside, SOFTPLUS, EDGE
        )
        dy = load_tile(g_p + channel, t0, G_T, live, begin, end, EDGE)
        if GATE:
            z = load_tile(z_p + channel, t0, Z_T, live, begin, end, EDGE)
            dy *= z * sigmoid(z)
        du = dt * x
        s1 = tl.zeros([R, 8], tl.float32)
        s2 = tl.zeros([R, 8], tl.float32)
        for start in range(0, PADDED, 8 * U):
            sums = tl.zeros([WIDE, 8], tl.float32)
            for i in range(tl.minimum((PADDED - start) // U, 8)):
                summands = ()
                for u in tl.static_range(U):
                    n = start + i * U + u
                    rate = tl.load(a_p + n * CHANNELS + channel, mask=live, other=0.0)
                    h = tl.load(kept_p + n * CHANNELS + channel, mask=live, other=0.0)
                    w = tl.load(w_p + n * CHANNELS, mask=live, other=0.0)
                    da = tl.load(da_p + n * CHANNELS, mask=live, other=0.0)
                    s1, s2, w, da, pb, pc = retreat(dt, du, dy, s1, s2, h, w, da, rate, bc_p + n * 16)
                    tl.store(w_p + n * CHANNELS, w, mask=live)
                    tl.store(da_p + n * CHANNELS, da, mask=live)
                    summands = summands + (tl.join(pairs(pb), pairs(pc)),)
                if U == 2:
                    both = tl.join(summands[0], summands[1])
                else:
                    both = summands[0]
                sums = tl.where(column == i, add_lanes(tl.reshape(both, [32, WIDE]), EXACT), sums)
            real = (column < (PADDED - start) // U) & (entry >= 0)
            tl.store(parts_p + start * 16 + column * WIDE + entry, sums, mask=real)
        # loaded again: kept, they would cost registers
        x2 = load_tile(x_p + channel, t0, X_T, live, begin, end, EDGE)
        ddt = x2 * s1 + s2 * LN2
        if SOFTPLUS:
            ddt *= sigmoid(load_tile(dt_p + channel, t0, DT_T, live, begin, end, EDGE) + bias[:, None])
        if EDGE:
            ddt = tl.where(inside[None, :], ddt, 0.0)
        dskip += tl.sum(dy * x2, 1)
        dbias += tl.sum(ddt, 1)
        store_tile(dx_p, dt * s1 + skip[:, None] * dy, t0, OUT_T, live, begin, end, EDGE)
        store_tile(ddt_p, ddt, t0, OUT_T, live, begin, end, EDGE)
        bc_p -= GROUPS * PADDED * 16
        parts_p -= GROUPS * PADDED * 16
        kept_p -= AREA
    # never true: without a use the loads ahead would be left out
    tl.store(da_p, seen, mask=live & (channel * 0 + length < 0))
    vectors_p += tl.cast(item, tl.int64) * (2 * CHANNELS) + channel
    tl.store(vectors_p, dskip, mask=live)
    tl.store(vectors_p + CHANNELS, dbias, mask=live)
    if INITIAL:
        if item == first:
            tl.debug_barrier()
            for k in range(STATES):
                passed = tl.load(w_p + k * CHANNELS, mask=live, other=0.0)
                tl.store(initial_p + sequence * (CHANNELS * STATES) + channel * STATES + k, passed, mask=live)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    parts_p,
    da_p,
    vectors_p,
    bounds,
    db_p,
    dc_p,
    out_a,
    out_d,
    out_bias,
    length,
    tiles,
    sequences,
    segment,
    slots,
    items,
    tile_programs,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    ITEMS: tl.constexpr,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Add the parts: a program does a tile of dB and dC of a group, or 128 channels of one state of dA, of dD or dbias.

    db and dc (rows, length, groups, states), out_a (channels, states) and the others are contiguous.
    """
    pid = tl.program_id(0)
    if pid < tile_programs:
        per_group: tl.constexpr = (CHANNELS // GROUPS + R - 1) // R
        group = pid % GROUPS
        row = (pid // GROUPS // tiles).to(tl.int64)
        tile = pid // GROUPS % tiles
        n = tl.arange(0, WIDTH)[:, None]
        v = tl.arange(0, 16)[None, :]  # token, then B or C
        t = tile * 8 + v // 2
        at = parts_p + n // U * (16 * U) + v * U + n % U
        stride = tl.cast(slots, tl.int64) * (GROUPS * PADDED * 16)
        real = (n < STATES) & (t < length)
        total = tl.zeros([WIDTH, 16], tl.float32)
        if VARLEN:
            begin = tile * 8
            stop = tl.minimum(begin + 8, length)
            sequence = first_beyond(bounds, sequences, begin)
            while (sequence < sequences) & (begin < stop):
                end = tl.load(bounds + sequence + 1).to(tl.int32)
                if end > begin:
                    slot = tl.cast(tile + sequence + tile * 8 // segment, tl.int64)
                    own = real & (t >= begin) & (t < end)
                    for block in range(per_group):
                        part = at + block * stride + (slot * GROUPS + group) * (PADDED * 16)
                        total += tl.load(part, mask=own, other=0.0)
                begin = end
                sequence += 1
        else:
            at += ((row * tiles + tile) * GROUPS + group) * (PADDED * 16)
            for block in range(per_group):
                total += tl.load(at + block * stride, mask=real, other=0.0)
        to = ((row * length + t) * GROUPS + group) * STATES + n
        tl.store(db_p + to, total.to(db_p.dtype.element_ty), mask=real & (v % 2 == 0))
        tl.store(dc_p + to, total.to(dc_p.dtype.element_ty), mask=real & (v % 2 == 1))
    else:
        blocks: tl.constexpr = (CHANNELS + 127) // 128
        which = (pid - tile_programs) // blocks  # a state, or STATES for D, or STATES + 1 for dt_bias
        channel = (pid - tile_programs) % blocks * 128 + tl.arange(0, 128)
        live = channel < CHANNELS
        p = da_p + which * CHANNELS
        each = PADDED * CHANNELS
        if which >= STATES:
            p = vectors_p + (which - STATES) * CHANNELS
            each = 2 * CHANNELS
        sums = tl.zeros([128], tl.float32)
        i = tl.arange(0, ITEMS)[:, None].to(tl.int64)
        for item in range(0, items, ITEMS):
            known = live[None, :] & (item + i < items)
            sums += tl.sum(tl.load(p + (item + i) * each + channel[None, :], mask=known, other=0.0), 0)
        if which < STATES:
            tl.store(out_a + channel * STATES + which, sums.to(out_a.dtype.element_ty), mask=live)
        if SKIP:
            if which == STATES:
                tl.store(out_d + channel, sums.to(out_d.dtype.element_ty), mask=live)
        if BIAS:
            if which == STATES + 1:
                tl.store(out_bias + channel, sums.to(out_bias.dtype.element_ty), mask=live)
