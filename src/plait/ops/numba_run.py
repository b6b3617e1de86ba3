"""How the CPU kernels are called: compiled when first needed, on torch's threads, with tensors as flat arrays.

Numba's cache of a kernel does not depend on this module. It imports Numba, so only what calls kernels imports it.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from plait.ops.threads import pool

SMALL = 1 << 16
"""Below this many elements other threads cost more than they bring."""

_PLAIN = (Tensor, torch.nn.Parameter)
_log = logging.getLogger("plait.ops")
_ready: set[Any] = set()
_compiling = threading.Lock()


def run(kernel: Any, tasks: int, work: int, *args: Any) -> None:
    """Call kernel(first, last, *args) until all tasks are done, on as many threads as torch uses.

    `work` is the number of elements in all. Tasks write to places of their own, so their order changes no number.
    """
    variant = (kernel, *map(_kind, args))
    if variant not in _ready:
        _compile(kernel, (0, tasks, *args))
        _ready.add(variant)
    threads = min(torch.get_num_threads(), tasks) if work >= SMALL else 1
    if threads <= 1:
        kernel(0, tasks, *args)
        return
    grain = max(1, tasks // (4 * threads))
    # taking the next range is one call under the interpreter's lock, so no two threads get the same one
    todo = itertools.chain(range(0, tasks, grain))

    def work_on() -> None:
        for begin in todo:
            kernel(begin, min(begin + grain, tasks), *args)

    pool().submit(work_on)


def flat(x: Tensor) -> np.ndarray:
    """The memory that x spans, as one array (bfloat16 as uint16): one kind of array, so one compilation, for all."""
    if x.requires_grad:
        x = x.detach()
    if not x.is_contiguous():
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride())) if x.numel() else 0
        x = x.as_strided((span,), (1,))
    # not .numpy(): it would forbid FSDP to free the storage of a parameter it has gathered
    return np.from_dlpack((x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).view(-1))


def direct(op: Any, function: Callable[..., Any], *args: Any) -> Any:
    """The custom op made of ``function``; the function itself where nobody would notice, which saves 20 us a call.

    Those who do: autograd, whoever traces or counts operations, and tensors that are not plain.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    tensors = [a for a in args if a is not None and isinstance(a, Tensor)]
    noticed = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(type(t) not in _PLAIN for t in tensors)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )
    return op(*args) if noticed else function(*args)


def rows(x: Tensor) -> tuple[np.ndarray, int]:
    """x (R, E) as `flat`, and the elements from a row to the next; copied where the channels lie apart."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return flat(x), x.stride(0)


def written(x: Tensor) -> torch.dtype:
    """The dtype that kernels write for x: its own, or float32 where they have no other."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def tokens(*tensors: Tensor) -> list[Any]:
    """Each (S, T, E) as `flat` and its first two strides: all bfloat16 or all float32, channels together."""
    if not all(t.dtype == torch.bfloat16 for t in tensors):
        tensors = tuple(t.float() for t in tensors)
    together = (t if t.numel() == 0 or t.stride(2) == 1 else t.contiguous() for t in tensors)
    return [item for t in together for item in (flat(t), t.stride()[:2])]


def numbers(t: Tensor | None, count: int = 0) -> np.ndarray:
    """All elements in order, as float32; so many zeros for None."""
    return np.zeros(count, np.float32) if t is None else flat(t.detach().float().contiguous())


def weights(channels: int, weight: Tensor | None) -> np.ndarray:
    """A norm's weights (E,) as float32; ones for None."""
    return np.ones(channels, np.float32) if weight is None else flat(weight.float().contiguous())


def _kind(a: Any) -> Any:
    """What tells the types of arguments apart: arrays are all flat; a tuple of tuples holds zeros, it is its type."""
    if isinstance(a, np.ndarray):
        return a.dtype
    if isinstance(a, tuple):
        return a if a and isinstance(a[0], tuple) else (tuple, *map(type, a))
    return type(a)


def _compile(kernel: Any, args: tuple[Any, ...]) -> None:
    """Compile `kernel` for these arguments, or load it from Numba's cache."""
    with compiling():
        kernel.compile(tuple(numba.typeof(a) for a in args))


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, kernels may be compiled: one thread at a time, and who waits long is told why."""
    with _compiling:
        timer = threading.Timer(1.0, _say_compiling)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@cache
def _say_compiling() -> None:
    _log.warning("compiling CPU kernels, once per machine")
