"""What lies under the CPU kernels: the arithmetic of tiles, and that kernels follow when it changes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest

from plait.ops import numba_support, numba_team, tile_math, tiles
from plait.ops.add_norm import cpu_kernels as add_kernels
from plait.ops.causal_conv1d import cpu_kernels as conv_kernels
from plait.ops.causal_conv1d_update import cpu_kernels as conv_update
from plait.ops.diagonal_ssm import cpu_kernels as diagonal_kernels
from plait.ops.gated_norm import cpu_kernels as norm_kernels
from plait.ops.norm_linear import cpu_kernels as linear_kernels
from plait.ops.numba_support import exp2, first, load, sigmoid, store
from plait.ops.selective_scan import cpu_kernels as scan_kernels
from plait.ops.selective_state_update import cpu_kernels as selective_update
from plait.ops.ssd import cpu_backward as ssd_backward
from plait.ops.ssd import cpu_kernels as ssd_kernels
from plait.ops.ssd_update import cpu_kernels as ssd_update
from plait.ops.tile_math import (
    row_read,
    row_write,
    rowwise,
    tile_clip,
    tile_column,
    tile_exp2,
    tile_flush,
    tile_reciprocal,
)
from plait.ops.tiles import borrow, parts, row_load, tile_inner, tile_load, tile_outer, tile_store, tile_turn

KERNELS = [add_kernels, conv_kernels, diagonal_kernels, norm_kernels, scan_kernels, ssd_kernels, ssd_backward]
BESIDES = {
    ssd_backward: [ssd_kernels],
    linear_kernels: [numba_team],
    conv_update: [numba_team, linear_kernels],
    selective_update: [numba_team, linear_kernels, conv_update, scan_kernels],
    ssd_update: [numba_team, linear_kernels, conv_update],
}
DECODING = [linear_kernels, conv_update, selective_update, ssd_update]


@pytest.mark.parametrize("kernels", [*KERNELS, *DECODING], ids=lambda k: ".".join(k.__name__.split(".")[-2:]))
def test_kernels_are_compiled_again_when_what_is_under_them_changes(kernels: ModuleType) -> None:
    """Numba's cache looks at the file of a kernel alone, so that file names what it was written for."""
    files = (numba_support, tiles, tile_math, *BESIDES.get(kernels, []))
    stamp = hashlib.sha256(b"".join(Path(str(f.__file__)).read_bytes() for f in files)).hexdigest()[:8]
    assert stamp == kernels.TILES, f"the tiles have changed: write {stamp} to TILES in {kernels.__file__}"


@numba.njit
def _apply(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, 16):
        v = load(x, i, None)
        store(out, i, exp2(v), None)
        store(out, x.size + i, sigmoid(v), None)


def test_exponentials_and_sigmoids_over_their_whole_range() -> None:
    x = np.concatenate([np.linspace(-150, 127.4, 16 * 60), np.linspace(-1e-2, 1e-2, 16 * 4)]).astype(
        np.float32
    )
    out = np.empty(2 * x.size, np.float32)
    _apply(x, out)
    wide = x.astype(np.float64)
    normal = wide > -126
    np.testing.assert_allclose(out[: x.size][normal], np.exp2(wide[normal]), rtol=2e-7)
    assert (out[: x.size][~normal] <= 2.0**-125.9).all()
    error = np.abs(out[x.size :] * (1 + np.exp(-wide)) - 1)
    near = wide > -87  # further out it is denormal, then 0
    assert (error[near] <= 3e-7 + 6e-8 * np.abs(wide[near])).all()  # e^-x is of a rounded x log2(e)
    assert (out[x.size :][wide < -89] == 0).all()


def test_powers_of_slow_decays_keep_their_precision() -> None:
    """2^x as x goes to 0 is what a long memory multiplies thousands of times: its error must go to 0 with x."""
    x = -np.logspace(-7, -1, 16 * 20).astype(np.float32)
    out = np.empty(2 * x.size, np.float32)
    _apply(x, out)
    error = np.abs(out[: x.size].astype(np.float64) - np.exp2(x.astype(np.float64)))
    assert (error <= 2.0**-25 + 1e-6 * np.abs(x)).all()


@numba.njit(forceinline=True)
def _row(r, total, x, scale, number):  # type: ignore[no-untyped-def]
    x = x * scale + number
    return x, total + x * np.float32(r)


@numba.njit
def _tile(shape, x, out):  # type: ignore[no-untyped-def]
    tile = tile_load(shape, x, 0, 16)
    row = row_read(x, 64, None)
    made, total = rowwise(_row, row, tile, tile_column(shape, x, 80), np.float32(3))
    tile_store(out, 0, 16, made)
    row_write(out, 64, total, None)
    row_write(out, 80, tile_reciprocal(tile_clip(row, np.float32(0.5), np.float32(2))), first(5))
    row_write(out, 96, tile_exp2(row - row / (row * row)), None)


def test_tiles_broadcast_and_rows_are_taken_in_order() -> None:
    x = np.random.default_rng(0).uniform(0.1, 3, 96).astype(np.float32)
    out = np.zeros(112, np.float32)
    _tile(((0,),) * 4, x, out)
    tile, row = x[:64].reshape(4, 16), x[64:80]
    made = tile * x[80:84, None] + 3
    np.testing.assert_allclose(out[:64].reshape(4, 16), made, rtol=1e-6)
    np.testing.assert_allclose(out[64:80], row + (made * np.arange(4)[:, None]).sum(0), rtol=1e-6)
    np.testing.assert_allclose(out[80:85], 1 / row.clip(0.5, 2)[:5], rtol=3e-7)
    assert (out[85:96] == 0).all()
    np.testing.assert_allclose(out[96:], np.exp2(row - 1 / row), rtol=1e-6)


@numba.njit
def _turned(shape, x, out):  # type: ignore[no-untyped-def]
    tile_store(out, 0, 16, tile_turn(tile_load(shape, x, 0, 16)))


def test_a_square_tile_is_transposed() -> None:
    x = np.arange(256, dtype=np.float32)
    out = np.zeros(256, np.float32)
    _turned(((0,),) * 16, x, out)
    np.testing.assert_array_equal(out.reshape(16, 16), x.reshape(16, 16).T)


@numba.njit
def _sum_of_products(shape, a, x, out):  # type: ignore[no-untyped-def]
    tile = tile_outer(tile_load(shape, x, 32, 32), a, 1, 5, row_load(shape, x, 0))
    tile_store(out, 0, 32, tile)
    row_write(out, 96, tile_flush(row_read(x, 0, None), np.float32(0.5)), None)


def test_outer_products_of_numbers_that_lie_apart_and_flushing() -> None:
    random = np.random.default_rng(1)
    a, x = random.uniform(-1, 1, 16).astype(np.float32), random.uniform(0, 1, 128).astype(np.float32)
    x[3] = np.nan
    out = np.zeros(112, np.float32)
    _sum_of_products(((0, 0),) * 3, a, x, out)
    want = x[32:].reshape(3, 32) + a[1:12:5, None] * x[:32]
    np.testing.assert_allclose(out[:96].reshape(3, 32), want, rtol=1e-6)
    np.testing.assert_array_equal(out[96:], np.where(x[:16] < 0.5, 0, x[:16]))


@numba.njit
def _inner_products(shape, x, out):  # type: ignore[no-untyped-def]
    room = np.zeros(48, np.float32)
    sums, rest = parts(room, (16, 32))
    x, out = borrow(x, out)
    tile_inner(sums, 2, tile_load(shape, x, 0, 32), tile_load(shape, x, 128, 32))
    tile_inner(sums, 2, tile_load(shape, x, 0, 32), tile_load(shape, x, 128, 32))
    for i in range(16):
        out[i] = sums[i]
    out[16], out[17], out[18] = sums.size, rest.size, x.size
    rest[0] = np.float32(7)
    out[19] = room[16]


def test_inner_products_of_rows_are_added_and_parts_lie_side_by_side() -> None:
    x = np.random.default_rng(2).uniform(-1, 1, 256).astype(np.float32)
    out = np.zeros(20, np.float32)
    _inner_products(((0, 0),) * 4, x, out)
    want = np.zeros(16)
    want[2:6] = 2 * (x[:128].reshape(4, 32).astype(np.float64) * x[128:].reshape(4, 32)).sum(1)
    np.testing.assert_allclose(out[:16], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[16:], [16, 32, 256, 7])
