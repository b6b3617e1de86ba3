"""Launch a Triton kernel again and again at little cost on the host.

Triton's own launch looks at every argument to find which compiled form of the kernel fits: that takes longer than many
kernels run. Ops therefore keep a `Launch` for each shape, stride, dtype and device they have met (a cached function of
these makes it), and only the tensors change from call to call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from plait.ops.triton_support import INTERPRET, on_device

ALIGNMENT = 16
"""Bytes to which the compiled form that is kept may expect tensors to be aligned; others take Triton's own way."""


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
        addresses = 0
        for t in tensors:
            addresses |= t.data_ptr()
        with on_device(tensors[0]):
            if self._run is not None and addresses % ALIGNMENT == 0:
                self._run(*tensors, *self._rest)
                return
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
            if addresses % ALIGNMENT == 0 and not INTERPRET.value:
                self._run = compiled[self._grid]
