"""How the GPU kernels of decoding are called: directly, or as registered ops where torch has to see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plait.ops.triton_support import plain_op


class StepOp:
    """A function that launches kernels and changes some of its arguments in place, without a gradient.

    torch.compile and dispatch modes see the registered op plait::<name>; a plain call goes to the function.
    `function` is annotated as torch.library wants it, and `mutates` names what it changes.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
    ) -> None:
        self.op = plain_op(name, function, fake, mutates)
        self._direct = function

    def __call__(self, *args: Any) -> Any:
        """Run on positional arguments."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.op(*args)
        return self._direct(*args)


def columns(x: Tensor) -> Tensor:
    """x (R, C), copied if its columns do not lie side by side."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
