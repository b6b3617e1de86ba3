"""The time-invariant diagonal state-space model on GPUs: the Triton kernels of `gpu_kernels.py` as a torch op.

The op takes complex numbers as pairs, (E, N, 2), and real ones as (E, N, 1). It likes channels side by side; x or
gradients in another order are copied. Only the inputs are kept for backward. Two runs are equal bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.diagonal_ssm import gpu_kernels
from plait.ops.triton_launch import Plans, Program
from plait.ops.triton_support import KernelOp, cdiv, power_of_2

PROGRAMS = 2048
"""That fill a GPU: rows are cut into chunks until there are about as many."""
SHORTEST = 128
"""Tokens a chunk at least, because cutting costs a second pass."""


def diagonal_ssm(
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x (S, T, E), dA, B, C (E, N), D (E) -> y (S, T, E), final state (S, E, N), or (S, E, N, 2) if complex.

    Packed: one row (1, n, E) with cu_seqlens (S+1,); max_len is not needed here. Computes in float32; x may not be
    float64.
    """
    if dA.is_complex():
        given = (torch.view_as_real(t) for t in (dA, B, C))
        return DIAGONAL(x, *given, D, initial_state, cu_seqlens)
    initial = None if initial_state is None else initial_state.unsqueeze(-1)
    y, final = DIAGONAL(x, *(t.unsqueeze(-1) for t in (dA, B, C)), D, initial, cu_seqlens)
    return y, final.squeeze(-1)


class Cut(NamedTuple):
    """How the work is cut, for one kind of call."""

    rows: int
    chunks: int
    """of a row"""
    blocks: int
    """of channels"""
    numbers: dict[str, Any]
    """of all kernels, by their names for them"""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of the kernels that walk through chunks."""
        return self.rows * self.chunks * self.blocks, 1, 1


def cut(x: Tensor, dA: Tensor, n_seq: int, varlen: bool) -> Cut:
    """Cut x (rows, T, E) into chunks of tokens and blocks of channels."""
    rows, length, channels = x.shape
    blocks = cdiv(channels, gpu_kernels.CHANNELS.value)
    chunk_tokens = max(power_of_2(cdiv(length * rows * blocks, PROGRAMS)), SHORTEST)
    chunks = max(cdiv(length, chunk_tokens), 1)
    numbers = {
        "channels": channels, "length": length, "sequences": n_seq, "chunks": chunks, "blocks": blocks,
        "chunk_tokens": chunk_tokens, "STATES": dA.shape[1], "PAIR": dA.shape[2], "VARLEN": varlen,
        "row_stride": x.stride(0), "stride": x.stride(1),
    }  # fmt: skip
    return Cut(rows, chunks, blocks, numbers)


def _forward(
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state (S, E, N, PAIR) in float32."""
    y, final = _fake_forward(x, dA, B, C, D, initial, cu_seqlens)
    if final.numel() == 0:
        return y.zero_() if D is None else torch.mul(x, D, out=y), final
    x = _rows(x)
    dA, B, C = (t.contiguous() for t in (dA, B, C))
    D, initial = (None if t is None else t.contiguous() for t in (D, initial))

    def make() -> Program:
        program = Program(("x", "dA", "B", "C", "D", "initial", "bounds", "y", "final"))
        c = cut(x, dA, final.shape[0], cu_seqlens is not None)
        carry = _states(program, c, initial is not None)
        program.memory("work", c.rows * c.chunks, *_each(dA))
        names = ("x", "weights", "D", "initial", "bounds", carry, "work", "y", "final")
        flags = {"SKIP": D is not None, "INITIAL": initial is not None}
        program.add(gpu_kernels.forward_kernel, c.grid, names, c.numbers | flags, num_warps=1)
        return program

    key = ("forward", *_key(x, dA, B, C, D, initial, cu_seqlens))
    plans.of(key, make)(x, dA, B, C, D, initial, cu_seqlens, y, final)
    return y, final


def _fake_forward(x, dA, B, C, D, initial, cu_seqlens):  # type: ignore[no-untyped-def]
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(n_seq, *dA.shape, dtype=torch.float32)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dA, B, C, D and the initial state; empty for what was not given."""
    grads = _fake_backward(dy, dfinal, x, dA, B, C, D, initial)
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.numel() == 0 or dA.numel() == 0 or n_seq == 0:
        for grad in grads:
            grad.zero_()
        if D is not None and x.numel() > 0:
            torch.mul(dy, D, out=grads[0])
            grads[4].copy_((dy * x).sum((0, 1)))
        if initial is not None and dfinal is not None:
            grads[5].copy_(dfinal)
        return grads
    x, dy = _rows(x), _rows(dy)
    dA, B, C = (t.contiguous() for t in (dA, B, C))
    D, initial, dfinal = (None if t is None else t.contiguous() for t in (D, initial, dfinal))

    def make() -> Program:
        program = Program(
            (
                "dy",
                "dfinal",
                "x",
                "dA",
                "B",
                "C",
                "D",
                "initial",
                "bounds",
                "dx",
                "ddA",
                "dB",
                "dC",
                "dD",
                "dinitial",
            )
        )
        c = cut(x, dA, n_seq, cu_seqlens is not None)
        carry = _states(program, c, initial is not None)
        dy_strides = {"row_stride": dy.stride(0), "stride": dy.stride(1)}
        back = _carried(program, c, "dy", "dfinal", dfinal is not None, c.numbers | dy_strides, back=True)
        tiles = cdiv(x.shape[1], gpu_kernels.TILE.value) + c.chunks
        slots = tiles + n_seq + 1 if cu_seqlens is not None else c.rows * tiles
        program.memory("kept", slots, *_each(dA))
        program.memory("v", c.rows * c.chunks, *_each(dA))
        states, pair = dA.shape[1:]
        program.memory("parts", c.rows * c.chunks, 3 * pair * states + 1, x.shape[2])
        names = (
            "dy",
            "x",
            "weights",
            "D",
            "initial",
            "dfinal",
            "bounds",
            carry,
            back,
            "kept",
            "v",
            "parts",
            "dx",
        )
        flags = {
            "SKIP": D is not None, "INITIAL": initial is not None, "FINAL": dfinal is not None,
            "dy_row": dy.stride(0), "dy_stride": dy.stride(1),
        }  # fmt: skip
        kernel = gpu_kernels.backward_kernel
        program.add(kernel, c.grid, (*names, "dinitial"), c.numbers | flags, num_warps=1)
        to = ("parts", "weights", "ddA", "dB", "dC", "dD")
        grid = ((states + 1) * c.blocks, 1, 1)
        numbers = c.numbers | {"parts": c.rows * c.chunks, "SKIP": D is not None}
        program.add(gpu_kernels.finish_kernel, grid, to, numbers, num_warps=1)
        return program

    key = ("backward", *_key(x, dA, B, C, D, initial, cu_seqlens), dy.dtype, dy.stride(), _kind(dfinal))
    plans.of(key, make)(dy, dfinal, x, dA, B, C, D, initial, cu_seqlens, *grads)
    return grads


def _fake_backward(dy, dfinal, x, dA, B, C, D, initial, *_):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dA, B, C, D, initial))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    dy = torch.zeros_like(given[0]) if dy is None else dy
    grads = backward(dy, dfinal, *given)
    return (*(None if t is None else grad for t, grad in zip(given, grads, strict=False)), None)


DIAGONAL = KernelOp(
    "diagonal_ssm_gpu",
    _forward,
    _backward,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
"""The model with its gradient."""
plans: Plans[Program] = Plans()
"""Of the kinds of calls so far."""


def _key(
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Any, ...]:
    """All that a program depends on."""
    return (x.device, x.stride(), *(_kind(t) for t in (x, dA, B, C, D, initial, cu_seqlens)))


def _kind(t: Tensor | None) -> Any:
    """What a program knows of a tensor without gaps."""
    return None if t is None else (t.dtype, t.shape)


def _each(dA: Tensor) -> tuple[int, int, int]:
    """The shape of a chunk's states."""
    channels, states, pair = dA.shape
    return pair, states, channels


def _states(program: Program, c: Cut, initial: bool) -> str | None:
    """Append what the powers of p and the states that enter chunks need; the name of the latter, None for one chunk."""
    n = c.numbers
    program.memory("weights", 10, n["STATES"], n["channels"])
    names = ("dA", "B", "C", "weights")
    program.add(gpu_kernels.prepare_kernel, (n["STATES"] * c.blocks, 1, 1), names, n, num_warps=1)
    return _carried(program, c, "x", "initial", initial, n, back=False)


def _carried(
    program: Program, c: Cut, tokens: str, given: str, there: bool, numbers: dict[str, Any], *, back: bool
) -> str | None:
    """Append what finds the states that enter chunks, or (`back`) the gradients of those that leave."""
    if c.chunks == 1:
        return None
    local, carry = f"local {tokens}", f"carry {tokens}"
    for name in (local, carry):
        shape = (numbers["PAIR"], numbers["STATES"], numbers["channels"])
        program.memory(name, c.rows * c.chunks, *shape)
    numbers = numbers | {"BACK": back, "GIVEN": there}
    names: tuple[str | None, ...] = (tokens, "weights", given, "bounds", local)
    program.add(gpu_kernels.local_kernel, c.grid, names, numbers, num_warps=1)
    grid = (c.rows * c.blocks * numbers["STATES"], 1, 1)
    names = (local, "weights", "bounds", carry)
    program.add(gpu_kernels.carry_kernel, grid, names, numbers, num_warps=1)
    return carry


def _rows(x: Tensor) -> Tensor:
    """x (S, T, E), copied unless its channels lie side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
