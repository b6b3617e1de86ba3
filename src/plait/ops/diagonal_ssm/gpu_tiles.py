"""Pieces of the kernels of `gpu_kernels.py`: states and weights in memory, as pairs, and one step of the recurrence.

CHANNELS channels, one a lane; `area` is N E, the elements between the two parts of a pair; PAIR is 2 for complex
states, 1 for real ones, whose imaginary part is zero and costs nothing.
"""

# Triton's functions take and return what mypy has no types for.
# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(16)
CHANNELS = tl.constexpr(32)
BOTH = tl.constexpr(2)  # parts of each number of `weights`, also of real ones


@triton.jit
def load_pair(p, k, area, live, PAIR: tl.constexpr):
    """Number k of `weights` or of a state: the real and the imaginary part, zero if there is none."""
    re = tl.load(p + BOTH * k * area, mask=live, other=0.0)
    im = re * 0.0
    if PAIR == 2:
        im = tl.load(p + (BOTH * k + 1) * area, mask=live, other=0.0)
    return re, im


@triton.jit
def store_pair(p, re, im, area, live, PAIR: tl.constexpr):
    """Write a state."""
    tl.store(p, re, mask=live)
    if PAIR == 2:
        tl.store(p + area, im, mask=live)


@triton.jit
def load_given(p, sequence, n, channel, channels, live, STATES: tl.constexpr, PAIR: tl.constexpr):
    """State n of a sequence in a tensor (S, E, N, PAIR)."""
    at = ((tl.cast(sequence, tl.int64) * channels + channel) * STATES + n) * PAIR
    re = tl.load(p + at, mask=live, other=0.0).to(tl.float32)
    im = re * 0.0
    if PAIR == 2:
        im = tl.load(p + at + 1, mask=live, other=0.0).to(tl.float32)
    return re, im


@triton.jit
def store_given(p, re, im, sequence, n, channel, channels, live, STATES: tl.constexpr, PAIR: tl.constexpr):
    """Write what `load_given` reads."""
    at = ((tl.cast(sequence, tl.int64) * channels + channel) * STATES + n) * PAIR
    tl.store(p + at, re.to(p.dtype.element_ty), mask=live)
    if PAIR == 2:
        tl.store(p + at + 1, im.to(p.dtype.element_ty), mask=live)


@triton.jit
def mended(re, im, w_p, area, live, count, BACK: tl.constexpr, PAIR: tl.constexpr):
    """A state times (p / float32(p))^count, to first order; BACK: times the conjugate."""
    rest, rest_im = load_pair(w_p, 3, area, live, PAIR)
    rest = 1.0 + rest * count
    new = re * rest
    if PAIR == 2:
        rest_im *= count
        if BACK:
            rest_im = -rest_im
        new -= im * rest_im
        im = im * rest + re * rest_im
    return new, im


@triton.jit
def one_step(re, im, p, pi, b, bi, x, alive, PAIR: tl.constexpr):
    """h_t; h_{t-1} where the token is not alive."""
    new = p * re + b * x
    if PAIR == 2:
        new -= pi * im
        im = tl.where(alive, p * im + (pi * re + bi * x), im)
    return tl.where(alive, new, re), im


@triton.jit
def one_back(re, im, p, pi, c, ci, dy, PAIR: tl.constexpr):
    """v_t, and what it passes back, from what v_{t+1} passed back."""
    re = re + c * dy
    back = p * re
    back_im = im
    if PAIR == 2:
        im = im + ci * dy
        back += pi * im
        back_im = p * im - pi * re
    return re, im, back, back_im
