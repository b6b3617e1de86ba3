"""The state of every random number generator of a process: captured, restored, kept in plain tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.data.permutation import key_of


def seed_all(seed: int, *more: int) -> None:
    """Seed Python, numpy and torch; further numbers (a rank, a step) give unrelated streams."""
    key = key_of(seed, *more) if more else seed
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)


def capture() -> dict[str, Tensor]:
    """The states as named tensors (safetensors can hold them); ``restore`` takes them back."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)  # its stub allows another generator's form
    kind, keys, place, has_gauss, cached = numpy_state
    assert version == 3 and kind == "MT19937"
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(np.append(keys.astype(np.int64), place)),
        "numpy_gauss": _optional(cached if has_gauss else None),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Set every generator to a captured state; a GPU's only where there is one."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *keys, place = states["numpy"].tolist()
    cached = states["numpy_gauss"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), place, len(cached), cached[0] if cached else 0.0)
    np.random.set_state(state)
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever random numbers are drawn inside, outside it is as if none had been."""
    states = capture()
    try:
        yield
    finally:
        restore(states)


def _optional(value: float | None) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)
