"""Numba kernels of the running angle: forward, and its gradient, which is the running sum from the other end.

    theta_t = (theta_{t-1} + step_t) mod 2 pi;   dstep_t = the sum of dtheta_s over s >= t

A task is one sequence and WIDTH of the angles that lie side by side in a token. Sums are float64: in float32 the sum
of a few thousand steps has lost three digits of the angle.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
WIDTH = 256
"""angles a task"""
_TURN, _TURNS = 2 * math.pi, 0.5 / math.pi
_TURN32, _ZERO = np.float32(2 * math.pi), np.float32(0)


@njit(**OPTIONS)
def _turn(now: Any, step: Any, theta: Any) -> None:
    """Add the steps of a token, and write the angles."""
    for j in range(now.size):
        angle = now[j] + step[j]
        angle -= _TURN * np.floor(angle * _TURNS)
        now[j] = angle
        rounded = np.float32(angle)
        # the product may be one turn off, and an angle just below a turn may round up to it
        rounded = rounded + _TURN32 if rounded < _ZERO else rounded
        theta[j] = rounded - _TURN32 if rounded >= _TURN32 else rounded


@njit(**OPTIONS)
def forward(first, last, sizes, segments, step, initial, theta, final):  # fmt: skip
    """Tasks first to last - 1. sizes: tokens a row, angles a token, tasks a sequence; arrays are flat, float32.

    segments (4, S): row, first token and length of each sequence; step, theta (tokens, angles); initial, final
    (S, angles), initial empty for zeros.
    """
    length, angles, columns = sizes
    for task in range(first, last):
        s, a = task // columns, task % columns * WIDTH
        width = min(WIDTH, angles - a)
        begin, count = (segments[0, s] * length + segments[1, s]) * angles + a, segments[2, s]
        state = s * angles + a
        final[state : state + width] = _ZERO
        if initial.size > 0:
            final[state : state + width] = initial[state : state + width]
        now = final[state : state + width].astype(np.float64)
        for t in range(count):
            at = begin + t * angles
            _turn(now[:width], step[at : at + width], theta[at : at + width])
        if count > 0:
            end = begin + (count - 1) * angles
            final[state : state + width] = theta[end : end + width]


@njit(**OPTIONS)
def backward(first, last, sizes, segments, dtheta, dfinal, dstep, dinitial):  # fmt: skip
    """Fill dstep and dinitial; see `forward`. dfinal may be empty."""
    length, angles, columns = sizes
    for task in range(first, last):
        s, a = task // columns, task % columns * WIDTH
        width = min(WIDTH, angles - a)
        begin, count = (segments[0, s] * length + segments[1, s]) * angles + a, segments[2, s]
        state = s * angles + a
        now = np.zeros(width)
        if dfinal.size > 0:
            now[:] = dfinal[state : state + width]
        for t in range(count - 1, -1, -1):
            given = dtheta[begin + t * angles : begin + t * angles + width]
            written = dstep[begin + t * angles : begin + t * angles + width]
            for j in range(width):
                now[j] += given[j]
                written[j] = now[j]
        dinitial[state : state + width] = now
