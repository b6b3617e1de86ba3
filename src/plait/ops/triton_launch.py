"""Launch Triton kernels again and again at little cost on the host.

Triton's own launch looks at every argument to find which compiled form of the kernel fits: that takes longer than many
kernels run. Ops therefore keep a `Launch`, or for several kernels in a row a `Program`, for each shape, stride, dtype
and device they have met (a cached function of these makes it), and only the tensors change from call to call. The
compiled forms are given addresses instead of tensors, which Triton's launcher would ask for theirs one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.runtime import driver

from plait.ops.triton_support import INTERPRET, on_device

P = TypeVar("P")
ALIGNMENT = 16
"""Bytes to which the compiled form that is kept may expect tensors to be aligned; others take Triton's own way."""
_APART = 256
"""Bytes from one tensor of a program's own memory to the next are a multiple of this."""


class Launch:
    """A kernel with its grid, numbers and options; called with the tensors, which are the kernel's first parameters.

    `numbers` are the parameters that follow, `constants` by name those that are known when compiling, and options
    as num_warps (None: as if not given). All calls must give tensors of the same dtypes on the same device.
    """

    def __init__(self, kernel: Any, grid: int, numbers: tuple[int | float, ...], **constants: Any) -> None:
        self._kernel, self._grid, self._numbers = kernel, (grid, 1, 1), numbers
        self._constants = {name: value for name, value in constants.items() if value is not None}
        self._run: Callable[..., Any] | None = None
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the tensors' device; they are read and written where they lie."""
        if self._grid[0] == 0:
            return
        addresses = [t.data_ptr() for t in tensors]
        aligned = _together(addresses) % ALIGNMENT == 0
        with on_device(tensors[0]):
            if aligned and self._run is not None:
                self._run(*addresses, *self._rest)
                return
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
            if aligned and not INTERPRET.value:
                self._run = compiled[self._grid]


class _Step(NamedTuple):
    """One launch of a program: which of its tensors, and what follows them."""

    kernel: Any
    grid: tuple[int, int, int]
    places: tuple[int | None, ...]
    rest: dict[str, Any]
    options: dict[str, Any]


class Program:
    """Kernels that are launched one after the other, on tensors that each call gives and on memory of their own.

    `given` names the tensors of a call, in its order. `memory` adds a tensor that lasts for one call: all of them are
    one allocation. `part` names a piece of a given tensor. `add` appends a launch. All calls must give tensors of the
    same shapes, strides, dtypes and device, or None for the same of them; the first must not be None.
    """

    def __init__(self, given: Sequence[str]) -> None:
        self._places = {name: i for i, name in enumerate(given)}
        self._space = self._places[""] = len(given)
        # where each begins: the place of what it is in, and bytes
        self._begins: list[tuple[int, int]] = []
        self._shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._bytes = 0
        self._steps: list[_Step] = []
        self._ready: dict[tuple[bool, ...] | None, list[tuple[Any, Any, tuple[Any, ...]]]] = {}

    def memory(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        """Add a tensor of this shape; returns its name."""
        self.part(name, "", self._bytes, *shape, dtype=dtype)
        self._bytes += -(-prod(shape) * dtype.itemsize // _APART) * _APART
        return name

    def part(self, name: str, of: str, offset: int, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Name what begins so many bytes (a multiple of 4) into a given tensor, which is float32 without gaps."""
        self._begins.append((self._places[of], offset))
        self._shapes.append((shape, dtype))
        self._places[name] = len(self._places)

    def add(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: Sequence[str | None],
        numbers: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """Launch `kernel` next: its first parameters are these tensors, the others are found by name in `numbers`.

        A tensor that the kernel will not look at may be None here, or in the calls. Options as for `Launch`. An empty
        grid launches nothing.
        """
        if 0 in grid:
            return
        rest = {name: numbers[name] for name in kernel.arg_names[len(tensors) :]}
        places = tuple(None if name is None else self._places[name] for name in tensors)
        chosen = {name: value for name, value in options.items() if value is not None}
        self._steps.append(_Step(kernel, grid, places, rest, chosen))

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch all; the tensors are read and written where they lie."""
        like = tensors[0]
        assert like is not None
        space = torch.empty(self._bytes // 4, dtype=torch.float32, device=like.device)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        aligned = _together(addresses) % ALIGNMENT == 0
        kind = None if aligned else tuple(a % ALIGNMENT == 0 for a in addresses)
        with on_device(like):
            ready = self._ready.get(kind)
            if ready is None:
                self._launch_first(tensors, space, kind)
                return
            addresses.append(space.data_ptr())
            addresses += [addresses[place] + offset for place, offset in self._begins]
            # asked for once: each launch would ask
            stream = driver.active.get_current_stream(like.device.index)
            for run, pick, rest in ready:
                run(*pick(addresses), *rest, stream=stream)

    def _launch_first(
        self, tensors: tuple[Tensor | None, ...], space: Tensor, kind: tuple[bool, ...] | None
    ) -> None:
        """Triton's own way, which compiles what is not compiled yet; what it finds is kept."""
        everything = [*tensors, space]
        for (place, offset), (shape, dtype) in zip(self._begins, self._shapes, strict=True):
            whole, words = everything[place], -(-prod(shape) * dtype.itemsize // 4)
            assert whole is not None
            part = whole.view(-1)[offset // 4 : offset // 4 + words].view(dtype)
            everything.append(part[: prod(shape)].view(shape))
        ready = []
        for kernel, grid, places, rest, options in self._steps:
            # for a tensor that is not there any other will do
            found = [None if place is None else everything[place] for place in places]
            stand_in = next(t for t in found if t is not None)
            arguments = (stand_in if t is None else t for t in found)
            compiled = kernel[grid](*arguments, **rest, **options)
            if not INTERPRET.value:
                # at the front, where the first tensor of a call always is
                pick = itemgetter(*(0 if place is None else place for place in places))
                ready.append((compiled[grid], pick, tuple(rest.values())))
        if not INTERPRET.value:
            self._ready[kind] = ready


class Plans(Generic[P]):
    """What was made for kinds of calls (hashable), kept for the next ones; all is forgotten once there are `most`."""

    def __init__(self, most: int = 1024) -> None:
        self.most = most
        self._made: dict[Any, P] = {}

    def of(self, key: Any, make: Callable[[], P]) -> P:
        """What `make` made for the first such call."""
        made = self._made.get(key)
        if made is None:
            if len(self._made) >= self.most:
                self._made.clear()
            made = self._made[key] = make()
        return made

    def clear(self) -> None:
        """Forget all."""
        self._made.clear()

    def __len__(self) -> int:
        return len(self._made)


def _together(addresses: list[int]) -> int:
    """The bits of all: aligned if each is."""
    bits = 0
    for address in addresses:
        bits |= address
    return bits
