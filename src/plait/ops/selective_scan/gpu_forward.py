"""The selective scan forward in Triton: B, C and A in the kernels' order, and the sweep over time.

    a_t = exp(dt_t A),  h_t = a_t h_{t-1} + dt_t x_t B_t,  y_t = C_t h_t + D x_t   (arXiv 2312.00752, eq. 2)
    y_t *= silu(z_t) if there is a gate

One sweep serves three times, told apart by MODE. LOCAL: the state that a segment of a sequence reaches from zero, and
the sum of its dt (its decay is exp(A * that)). OUTPUT: y, beginning with the state that the earlier segments' local
states and sums give. AGAIN, for the gradient: the same once more, keeping the state before each tile, and giving dz
and, for a segment, the gradient of its own outputs with respect to the state that enters it.

See gpu_tiles.py for tiles, items and slots. Packed B and C are [slots, G, N, 16] in float32: eight tokens of B and
eight of C; packed A is [N, channels], in units of log 2, so that a_t = 2^(dt_t A). States lie in memory between tiles:
they stay in the caches, and the loop over them is compiled once for any N.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton knows no starred tuples, and decides an `if` on a constexpr before it looks inside.
# ruff: noqa: RUF005, SIM102

from __future__ import annotations

import triton
import triton.language as tl

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
from plait.ops.triton_support import LOG2E

SIZES = ["length", "tiles", "sequences", "segment", "segments", "slots", "items", "tile_programs"]
"""Arguments whose values make no new compilation (1 and multiples of 16 else would)."""
LOCAL = tl.constexpr(0)
OUTPUT = tl.constexpr(1)
AGAIN = tl.constexpr(2)


@triton.jit(do_not_specialize=SIZES)
def pack_kernel(
    b_p,
    c_p,
    a_p,
    bc_p,
    packed_p,
    bounds,
    b_r,
    b_t,
    b_g,
    b_n,
    c_r,
    c_t,
    c_g,
    c_n,
    a_e,
    a_n,
    length,
    tiles,
    sequences,
    segment,
    tile_programs,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """A program packs one tile of B and C of a group, or (from `tile_programs` on) A for 32 channels.

    WIDTH is PADDED, the number of states padded, as a power of two.
    """
    pid = tl.program_id(0)
    n = tl.arange(0, WIDTH)[:, None]
    if pid >= tile_programs:
        channel = (pid - tile_programs) * 32 + tl.arange(0, 32)[None, :]
        a = tl.load(a_p + channel * a_e + n * a_n, mask=(channel < CHANNELS) & (n < STATES), other=0.0)
        real_a = (channel < CHANNELS) & (n < PADDED)
        tl.store(packed_p + n * CHANNELS + channel, a.to(tl.float32) * LOG2E, mask=real_a)
    else:
        group = pid % GROUPS
        row = (pid // GROUPS // tiles).to(tl.int64)
        tile = pid // GROUPS % tiles
        t = tile * 8 + tl.arange(0, 8)[None, :]
        real = (n < STATES) & (t < length)
        at_b = b_p + row * b_r + group * b_g + n * b_n + t.to(tl.int64) * b_t
        at_c = c_p + row * c_r + group * c_g + n * c_n + t.to(tl.int64) * c_t
        b = tl.load(at_b, mask=real, other=0.0).to(tl.float32)
        c = tl.load(at_c, mask=real, other=0.0).to(tl.float32)
        at = bc_p + n * 16 + tl.arange(0, 8)[None, :]
        stored = (n < PADDED) & (t >= 0)
        if VARLEN:
            # every sequence with a token in the tile gets a slot with its own tokens, zeros elsewhere
            begin = tile * 8
            stop = tl.minimum(begin + 8, length)
            sequence = first_beyond(bounds, sequences, begin)
            while (sequence < sequences) & (begin < stop):
                end = tl.load(bounds + sequence + 1).to(tl.int32)
                if end > begin:
                    slot = tl.cast(tile + sequence + tile * 8 // segment, tl.int64)
                    own = (t >= begin) & (t < end)
                    tl.store(at + (slot * GROUPS + group) * (PADDED * 16), tl.where(own, b, 0.0), mask=stored)
                    tl.store(
                        at + (slot * GROUPS + group) * (PADDED * 16) + 8, tl.where(own, c, 0.0), mask=stored
                    )
                begin = end
                sequence += 1
        else:
            tl.store(at + ((row * tiles + tile) * GROUPS + group) * (PADDED * 16), b, mask=stored)
            tl.store(at + ((row * tiles + tile) * GROUPS + group) * (PADDED * 16) + 8, c, mask=stored)


@triton.jit
def advance(dt, du, dy, elapsed, y, h, w, rate, bc_p, READ: tl.constexpr, ENTERING: tl.constexpr):
    """A state through a tile: new y [R, 8], h and w (R).

    dt, du = dt x, dy: [R, 8]; rate (R): A in units of log 2. READ: y is computed. ENTERING: w gathers what the
    outputs add to the gradient of the state that entered the segment, `elapsed` (in sums of dt) before the tile.
    """
    steps = tl.arange(0, 8)
    decay = unpack(tl.exp2(dt * rate[:, None]))
    inputs = unpack(du * tl.load(bc_p + steps)[None, :])
    states = ()
    for j in tl.static_range(8):
        h = decay[j] * h + inputs[j]
        states = states + (h,)
    if READ or ENTERING:
        c = tl.load(bc_p + 8 + steps)[None, :]
        if READ:
            y += pack(states) * c
        if ENTERING:
            reads = unpack(dy * c)
            v = reads[7]
            for j in tl.static_range(7):
                v = reads[6 - j] + decay[7 - j] * v
            w += tl.exp2(elapsed * rate) * decay[0] * v
    return y, h, w


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    x_p,
    dt_p,
    z_p,
    g_p,
    bc_p,
    a_p,
    d_p,
    bias_p,
    initial_p,
    bounds,
    local_p,
    sums_p,
    elapsed_p,
    carry_p,
    kept_p,
    out_p,
    final_p,
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
    MODE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    INITIAL: tl.constexpr,
    SEGMENTED: tl.constexpr,
    VARLEN: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A program: R channels of an item, tile by tile, U states at a time.

    local_p and sums_p hold the local states and sums of dt of earlier segments. Written: out, y or (AGAIN) dz; final;
    elapsed, the item's sum of dt (LOCAL, AGAIN); carry, the states between tiles (LOCAL: in the end the local state)
    or (AGAIN) the gradient of the state that enters; kept, the states before each tile (AGAIN).
    """
    per_group: tl.constexpr = (CHANNELS // GROUPS + R - 1) // R
    READ: tl.constexpr = MODE == OUTPUT or (MODE == AGAIN and GATE)
    ENTERING: tl.constexpr = MODE == AGAIN and SEGMENTED
    AREA: tl.constexpr = PADDED * CHANNELS
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
    if MODE == LOCAL:
        if item == last:  # nothing follows
            tile_1 = tile_0
    row = tl.cast(row, tl.int64)
    sequence = tl.cast(sequence, tl.int64)
    x_p += row * x_r
    dt_p += row * dt_r
    z_p += row * z_r
    g_p += row * g_r
    out_p += row * out_r + channel
    slot = row * tiles + tile_0
    if VARLEN:
        slot += item
    bc_p += (slot * GROUPS + group) * (PADDED * 16)
    kept_p += slot * AREA + channel
    carry_p += tl.cast(item, tl.int64) * AREA + channel
    states_p = kept_p if MODE == AGAIN else carry_p
    bias = vector(bias_p, channel, live, BIAS)
    skip = vector(d_p, channel, live, SKIP)
    elapsed = vector(d_p, channel, live, False)
    # what enters the item
    for m in range(PADDED):
        h0 = vector(d_p, channel, live, False)
        if ENTERING:
            tl.store(carry_p + m * CHANNELS, h0, mask=live)
        if MODE != LOCAL:
            if INITIAL:
                at = initial_p + sequence * (CHANNELS * STATES) + channel * STATES + m
                h0 = tl.load(at, mask=live & (m < STATES), other=0.0).to(tl.float32)
            if SEGMENTED:
                rate0 = tl.load(a_p + m * CHANNELS + channel, mask=live, other=0.0)
                for earlier in tl.range(first, item, loop_unroll_factor=4):
                    h0 = follow(h0, rate0, local_p, sums_p, earlier, m, channel, live, CHANNELS, PADDED)
        tl.store(states_p + m * CHANNELS, h0, mask=live)
    seen = vector(d_p, channel, live, False)
    for tile in range(tile_0, tile_1):
        tl.debug_barrier()  # states written before are read by the lanes that need them now
        t0 = tile * 8
        seen = touch(x_p + first_channel, seen, channel, limit, t0 + 8, X_T, begin, end)
        seen = touch(dt_p + first_channel, seen, channel, limit, t0 + 8, DT_T, begin, end)
        if MODE == AGAIN:
            seen = touch(g_p + first_channel, seen, channel, limit, t0 + 8, G_T, begin, end)
        if MODE != LOCAL and GATE:
            seen = touch(z_p + first_channel, seen, channel, limit, t0 + 8, Z_T, begin, end)
        seen = touch_packed(bc_p + GROUPS * PADDED * 16, seen, PADDED, tile_1 - 1 - tile)
        x = load_tile(x_p + channel, t0, X_T, live, begin, end, EDGE)
        raw = load_tile(dt_p + channel, t0, DT_T, live, begin, end, EDGE)
        dt = step_size(raw, bias, inside_item(t0, begin, end), SOFTPLUS, EDGE)
        du = dt * x
        y = skip[:, None] * x
        dy = dt
        if MODE == AGAIN:
            g = load_tile(g_p + channel, t0, G_T, live, begin, end, EDGE)
            dy = g
        if MODE != LOCAL and GATE:
            z = load_tile(z_p + channel, t0, Z_T, live, begin, end, EDGE)
            s = sigmoid(z)
            if MODE == AGAIN:
                dy = g * z * s
        for first_n in range(0, PADDED, U):
            for u in tl.static_range(U):
                n = first_n + u
                rate = tl.load(a_p + n * CHANNELS + channel, mask=live, other=0.0)
                h = tl.load(states_p + n * CHANNELS, mask=live, other=0.0)
                w = h
                if ENTERING:
                    w = tl.load(carry_p + n * CHANNELS, mask=live, other=0.0)
                y, h, w = advance(dt, du, dy, elapsed, y, h, w, rate, bc_p + n * 16, READ, ENTERING)
                if ENTERING:
                    tl.store(carry_p + n * CHANNELS, w, mask=live)
                if MODE != AGAIN:
                    tl.store(states_p + n * CHANNELS, h, mask=live)
                else:  # the last tile's goes beyond the item's slots
                    tl.store(states_p + AREA + n * CHANNELS, h, mask=live & (channel * 0 + tile + 1 < tile_1))
        if MODE != OUTPUT:
            elapsed += tl.sum(dt, 1)
        if READ:
            if GATE:
                if MODE == AGAIN:
                    y *= g * s * (1.0 + z * (1.0 - s))
                else:
                    y *= z * s
            store_tile(out_p, y, t0, OUT_T, live, begin, end, EDGE)
        bc_p += GROUPS * PADDED * 16
        if MODE == AGAIN:
            states_p += AREA
    # never true: without a use the loads ahead would be left out
    tl.store(final_p + channel, seen, mask=live & (channel * 0 + length < 0))
    if MODE == LOCAL or ENTERING:
        tl.store(elapsed_p + tl.cast(item, tl.int64) * CHANNELS + channel, elapsed, mask=live)
    if MODE == OUTPUT:
        if item == last:
            tl.debug_barrier()
            for k in range(STATES):
                end_state = tl.load(states_p + k * CHANNELS, mask=live, other=0.0)
                tl.store(
                    final_p + sequence * (CHANNELS * STATES) + channel * STATES + k, end_state, mask=live
                )
