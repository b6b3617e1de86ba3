"""What the GPU kernels share: how they are launched, registered with torch, and how wide a tile may be.

This module imports Triton; only kernels import it, and those are loaded when a GPU backend is chosen. Whether one can
be chosen is said by `dispatch.py`. With TRITON_INTERPRET=1, set before Triton is first imported, Triton runs kernels
element by element on a CPU: for tests with small float32 inputs (its products of bfloat16 are wrong).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether kernels run in the interpreter; readable inside kernels."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SMALL_SHARED_MEMORY = 99 * 1024
"""Bytes of shared memory a program may have on every GPU from Ampere on."""
DEVICES = ("cpu", "cuda") if INTERPRET.value else ("cuda",)
_HERE = nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on `device`; in the interpreter that of an H200."""
    if INTERPRET.value:
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of `device`, to tell how many programs fill it; in the interpreter few."""
    if INTERPRET.value:
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels run on x's device: Triton launches on torch's current one."""
    if INTERPRET.value or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def precision(x: Tensor) -> str:
    """The `input_precision` of tl.dot that keeps x's digits: float32 products to about 2^-22."""
    if x.dtype != torch.float32:
        return "tf32"  # not used: products of 16-bit numbers are exact
    return "ieee" if INTERPRET.value or torch.version.hip else "tf32x3"


class KernelOp:
    """A forward and a backward function that launch kernels, as one differentiable op.

    torch.compile and dispatch modes see the registered ops plait::<name> and plait::<name>_backward (`forward` and
    `backward`, with fakes: `opcheck` them). A plain call goes through a torch.autograd.Function instead, at a fifth of
    the cost on the host, or where nothing needs a gradient straight to `forward`.

    `forward` and `run_backward` are annotated as torch.library wants it: they take tensors, optional tensors and
    numbers, and return fresh tensors. `save(ctx, inputs, output)` keeps what the gradient needs.
    `gradients(ctx, backward, *grads)` gets the function to call for `backward` and returns one gradient for each
    argument of `forward`; a gradient that nobody asked for comes as None.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        run_backward: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any],
        save: Callable[..., None],
        gradients: Callable[..., tuple[Any, ...]],
    ) -> None:
        self.backward = plain_op(f"{name}_backward", run_backward, fake_backward)
        self.forward = plain_op(name, forward, fake)

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        self.forward.register_autograd(
            lambda ctx, *grads: gradients(ctx, self.backward, *grads), setup_context=remember
        )

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = forward(*args)
                remember(ctx, args, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
                return gradients(ctx, run_backward, *grads)

        self._eager, self._direct = Eager, forward

    def __call__(self, *args: Any) -> Any:
        """Run forward on positional arguments."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.forward(*args)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            return self._eager.apply(*args)
        return self._direct(*args)


def plain_op(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Any:
    """Register `function` as the custom op plait::<name>, without a gradient."""
    op = torch.library.custom_op(f"plait::{name}", function, mutates_args=mutates, device_types=DEVICES)
    op.register_fake(fake)
    return op


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) to 2e-7 of itself, in fewer instructions than a logarithm takes.

    The polynomial is log(1 + e) / e for 0 <= e <= 1, interpolated at Chebyshev points: 5e-9.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = e * -0.0031760570127516985 + 0.019542526453733444
    p = p * e - 0.05637361481785774
    p = p * e + 0.10543623566627502
    p = p * e - 0.1526966691017151
    p = p * e + 0.1966327428817749
    p = p * e - 0.24951615929603577
    p = p * e + 0.33329710364341736
    p = p * e - 0.49999892711639404
    return tl.maximum(x, 0.0) + (p * e + 1.0) * e
