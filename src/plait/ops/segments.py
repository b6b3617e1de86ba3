"""Where the sequences of a CPU kernel's call lie, and where their saved states go."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import Tensor


def segments(
    n_seq: int, length: int, cu_seqlens: Tensor | None, block: int
) -> tuple[npt.NDArray[np.int64], int]:
    """(4, S): row, first token, length and number of the first saved state of each sequence; states in all.

    A state is saved before each block of so many tokens but a sequence's first. ValueError if cu_seqlens does not
    begin with 0, falls, or does not end with ``length``.
    """
    if cu_seqlens is None:
        return _dense(n_seq, length, block)
    table = np.zeros((4, n_seq), np.int64)
    bounds = cu_seqlens.numpy().astype(np.int64)
    if bounds[0] != 0 or bounds[-1] != length or (np.diff(bounds) < 0).any():
        raise ValueError(f"cu_seqlens must begin with 0, never fall and end with {length}: {bounds}")
    table[1], table[2] = bounds[:-1], np.diff(bounds)
    return _with_states(table, block)


@lru_cache(maxsize=64)
def _dense(n_seq: int, length: int, block: int) -> tuple[npt.NDArray[np.int64], int]:
    """The same table for each token that is decoded; kernels only read it."""
    table = np.zeros((4, n_seq), np.int64)
    table[0], table[2] = np.arange(n_seq), length
    return _with_states(table, block)


def _with_states(table: npt.NDArray[np.int64], block: int) -> tuple[npt.NDArray[np.int64], int]:
    saved = np.maximum(table[2] - 1, 0) // block
    table[3] = np.cumsum(saved) - saved
    return table, int(saved.sum())


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """S of x (S, T, ...), or (1, n, ...) with cu_seqlens (S+1,)."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
