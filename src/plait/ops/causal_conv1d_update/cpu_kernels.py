"""The Numba kernel of one new token of the causal convolution.

    y_c = act(bias_c + sum over j < W-1 of weight_cj state_jc + weight_c,W-1 x_c);   state <- state_1.., x

A task is a sequence and some channels. What it reads is widened to float32 first; the window is moved on with the
numbers as they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.ops.norm_linear.cpu_kernels import narrowed, widen
from plait.ops.numba_support import PIECE, load, sigmoid, store
from plait.ops.numba_team import Kernel, integers
from plait.ops.tiles import LANES

TILES = "79e57064"
"""Of the files the tiles are made of: a change there must change this one too, or Numba takes old kernels."""
CHANNELS = 8 * LANES
"""of a task"""


@njit(**PIECE)
def silu(x: Any, at: int, count: int) -> None:
    """x sigmoid(x) in place, up to LANES - 1 numbers more."""
    for c in range(at, at + count, LANES):
        v = load(x, c, None)
        store(x, c, v * sigmoid(v), None)


def _convolve(first: Any, last: Any, words: Any) -> None:
    """Tasks first to last - 1; the words are those of `cpu.py`."""
    p = integers(words)
    channels, width = p[0], p[1]
    blocks = (channels + CHANNELS - 1) // CHANNELS
    taps, window, sums = (
        np.zeros(CHANNELS * width, np.float32),
        np.zeros(CHANNELS * width, np.float32),
        np.zeros(CHANNELS, np.float32),
    )
    for task in range(first, last):
        row, c0 = task // blocks, task % blocks * CHANNELS
        count, tail = min(CHANNELS, channels - c0), row * (width - 1) * channels + c0
        widen(taps, 0, p[7], p[8], c0 * width, count * width)
        for j in range(width - 1):
            widen(window, j * CHANNELS, p[5], p[6], tail + j * channels, count)
        widen(window, (width - 1) * CHANNELS, p[2], p[3], row * p[4] + c0, count)
        for j in range(width - 1):
            narrowed(p[5], p[6], tail + j * channels, window, (j + 1) * CHANNELS, count)
        if p[9] != 0:
            widen(sums, 0, p[9], p[10], c0, count)
        else:
            sums[:] = np.float32(0)
        for j in range(width):
            for c in range(count):
                sums[c] += taps[c * width + j] * window[j * CHANNELS + c]
        if p[11]:
            silu(sums, 0, count)
        narrowed(p[12], p[13], row * channels + c0, sums, 0, count)


CONVOLVE = Kernel("causal_conv1d_update_cpu", _convolve)
