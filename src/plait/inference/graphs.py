"""Decoding from a recording: what a whole step does is recorded once and then started as one.

On a GPU that is a CUDA graph; on a CPU a list of kernels and operations (`cpu_capture`).

One token a sequence, from buffers whose addresses never change: ids, the cache's states and positions, logits. In a
step the host does nothing but count, and waits for nothing. A graph reads attention's past up to a bound
(``Cache.max_past``), so there is one for each bound that is met; layers whose states do not grow share one for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache as once
from importlib.util import find_spec

import torch
from torch import Tensor

from plait.config.lazy import load_object
from plait.mixers.constants import Table, held
from plait.models.cache import Cache
from plait.models.model import Model

Replay = Callable[[], object]
Capture = Callable[[Callable[[], None]], Replay]

WORTHWHILE = 16
"""Steps: recording costs about three steps that are not recorded, so fewer are not worth it."""


class StepGraphs:
    """``model.step`` for one more token of every sequence of ``cache``, recorded; the cache is the caller's as before.

    The weights must not change as long as this is in use: what follows from them alone is not recorded.
    Other calls may use the cache in between (prefill, chunks), as long as its tensors stay the same ones. Raises
    RuntimeError at the first step if a layer cannot be recorded; nothing has changed then.
    """

    def __init__(self, model: Model, cache: Cache, capture: Capture | None = None) -> None:
        self._model = model
        self._cache = cache
        self._capture = capture or capture_on(model.device)
        self._grows = any(m.state_bytes(1, 128) != m.state_bytes(1, 64) for m in model.mixers)
        self._ids = torch.zeros(cache.n_seq, 1, dtype=torch.int64, device=model.device)
        self._logits: Tensor | None = None
        self._replays: dict[int, Replay] = {}
        self._constants: Table = {}

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids (S,) -> logits (S, V) after them, in a buffer that the next call overwrites.

        CapacityError, before anything is written, if a sequence would outgrow the cache.
        """
        cache = self._cache
        cache.check_room([1] * cache.n_seq)
        self._ids.copy_(ids[:, None])
        bound = cache.max_past if self._grows else 0
        if bound not in self._replays:
            with held(self._constants):
                self._replays[bound] = self._record()
        self._replays[bound]()
        cache.lengths = [held + 1 for held in cache.lengths]
        assert self._logits is not None
        return self._logits

    @property
    def bounds(self) -> list[int]:
        """The bounds of the past for which a graph exists."""
        return list(self._replays)

    def _record(self) -> Replay:
        # Kernels that are compiled, and libraries that set themselves up, do so outside of the recording.
        logits = self._model.step(self._ids, self._cache.clone(), last_only=True)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        buffer, lengths = self._logits, list(self._cache.lengths)
        states, positions, capacity = self._cache.states, self._cache.positions, self._cache.capacity

        def step() -> None:
            # The device's side of the cache with a host's side of its own: recording is not running.
            own = Cache(states, positions, list(lengths), capacity)
            buffer.copy_(self._model.step(self._ids, own, last_only=True))

        return self._capture(step)


class CudaCapture:
    """Records what functions launch as CUDA graphs, which share one pool of memory: they never run at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Replay:
        """The recorded function; RuntimeError if it does what cannot be recorded, such as waiting for the device."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay


def capture_on(device: torch.device) -> Capture:
    """What records on a device."""
    if device.type == "cuda":
        return CudaCapture()
    # loaded when needed: it needs Numba
    made: Capture = load_object("plait.inference.cpu_capture:CpuCapture")()
    return made


def usable(model: Model, steps: int) -> bool:
    """Whether so many steps of a model are worth recording here: on a GPU or a CPU with kernels, outside of autocast.

    Autocast keeps narrow copies of the weights of its own, which do not outlive its block.
    """
    device = model.device.type
    records = device == "cuda" or (device == "cpu" and find_spec("numba") is not None)
    return records and steps >= WORTHWHILE and not torch.is_autocast_enabled(device)


@once
def say_why_not(reason: str) -> None:
    """Warn, once for each reason, that steps run without a recording."""
    warnings.warn(f"decoding runs without recorded steps, so it is slower: {reason}", stacklevel=2)
