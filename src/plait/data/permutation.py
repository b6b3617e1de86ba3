"""Order and chance as pure functions of numbers: a keyed permutation in O(1) memory, and keyed random
draws.

The permutation is a balanced Feistel network on the smallest even number of bits that holds the domain,
walked until it lands inside (cycle walking; Black and Rogaway 2002). The mixing function is the finaliser
of splitmix64 (Steele, Lea and Flood 2014). Nothing here depends on a library's random stream, so a run can
be resumed under another version.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: U64) -> U64:
    """A bijection of 64-bit words in which every input bit moves every output bit; modulo 2**64
    throughout.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """One 64-bit key of several integers; their order matters."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = mix(state * np.uint64(3) + _GOLDEN + np.array([number & _MASK], dtype=np.uint64))
    return int(state[0])


def words(key: int, count: int) -> U64:
    """(count,) random 64-bit words of a key; the first ones do not depend on how many are asked for."""
    return mix(np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + np.uint64(key))


def uniform(key: int, count: int) -> npt.NDArray[np.float64]:
    """(count,) random numbers in [0, 1) of a key."""
    return (words(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """A shuffle of 0 .. n - 1 chosen by a key; any place of it is computed alone."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._half = np.uint64(max(2, (n - 1).bit_length() + 1) // 2)
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = words(key, _ROUNDS)

    def __call__(self, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Where each index (any shape, 0 <= index < n) goes."""
        places = np.asarray(index, dtype=np.uint64).reshape(-1)
        places = self._encipher(places)
        while (outside := places >= np.uint64(self.n)).any():
            places[outside] = self._encipher(places[outside])
        return places.astype(np.int64).reshape(np.shape(index))

    def _encipher(self, x: U64) -> U64:
        left, right = x >> self._half, x & self._low
        for key in self._keys:
            left, right = right, left ^ (mix(right * _GOLDEN + key) & self._low)
        return (left << self._half) | right
