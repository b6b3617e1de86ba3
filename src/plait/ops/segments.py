"""Where the sequences of a CPU kernel's call lie, and where their saved states go."""

from __future__ import annotations

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
    table = np.zeros((4, n_seq), np.int64)
    if cu_seqlens is None:
        table[0], table[2] = np.arange(n_seq), length
    else:
        bounds = cu_seqlens.numpy().astype(np.int64)
        if bounds[0] != 0 or bounds[-1] != length or (np.diff(bounds) < 0).any():
            raise ValueError(f"cu_seqlens must begin with 0, never fall and end with {length}: {bounds}")
        table[1], table[2] = bounds[:-1], np.diff(bounds)
    saved = np.maximum(table[2] - 1, 0) // block
    table[3] = np.cumsum(saved) - saved
    return table, int(saved.sum())
