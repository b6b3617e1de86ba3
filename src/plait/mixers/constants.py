"""What mixers compute from their weights alone, kept while somebody promises that the weights do not change.

Decoding asks for it again with every token, at two kernels a layer or twenty microseconds on a CPU. Whoever decodes
holds a table for as long as it does, and steps inside of ``held(table)``; outside, and in training, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Table = dict[int, tuple[Tensor, Tensor]]
"""By the weight's id: the weight, so that no other takes its id, and what was computed from it."""


_held: ContextVar[Table | None] = ContextVar(
    "constants that are held", default=None
)  # each thread has its own


@contextmanager
def held(table: Table) -> Iterator[None]:
    """Inside, ``constant`` computes once what it is asked for, into ``table``."""
    token = _held.set(table)
    try:
        yield
    finally:
        _held.reset(token)


def constant(weight: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute(weight), or what it gave before for this weight in the table in force; one function a weight."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or (table := _held.get()) is None:
        return compute(weight)
    known = table.get(id(weight))
    if known is None:
        known = table[id(weight)] = (weight, compute(weight))
    return known[1]


def decay_rates(A_log: Tensor) -> Tensor:
    """-exp(A_log), in float32 at least: the rates at which states decay."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())
