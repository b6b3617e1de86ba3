"""Mamba-2 on GPUs, as a torch op: the Triton kernels that `gpu_engine.py` launches, and `gpu_step.py` for decoding.

The forward pass is two launches, backward nine or ten; six more in all where sequences are cut into pieces. Nothing
but the inputs is kept for backward. The order of every sum is fixed: two runs are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.ssd import gpu_step, gpu_steps
from plait.ops.ssd.gpu_engine import (
    Named,
    Plan,
    Tuning,
    as_rows,
    kind,
    narrow_strides,
    new_like,
    none_is_empty,
    plans,
)
from plait.ops.triton_support import KernelOp, cdiv, multiprocessors, power_of_2

STEP_TOKENS = 4
"""Up to so many tokens a sequence are taken one after the other."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence; shapes as in `plait.ops.ssd.ssd`. x is float32, bfloat16 or float16, and N at most 256.

    Products are of x's dtype (float32: full digits), states and decays float32. B and C are taken in x's dtype.
    """
    low, high = float(dt_limit[0]), float(dt_limit[1])
    y, final = SSD(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high)
    return y, final


FORWARD = ("x", "dt", "A", "k", "q", "D", "bias", "initial", "cu", "y", "final")
BACKWARD = (
    "x", "dt", "A", "k", "q", "D", "bias", "initial", "cu", "dy", "dfinal",
    "dx", "ddt", "dA", "dk", "dq", "dD", "dbias", "dinitial",
)  # fmt: skip
"""Tensors of a call by the kernels' names for them: k is B, q is C."""


def _key(
    what: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None, softplus: bool, low: float, high: float,
) -> tuple[Any, ...]:  # fmt: skip
    """All that a plan depends on."""
    return (
        what, x.device, x.dtype, x.shape, x.stride(), dt.dtype, dt.stride(), A.dtype, B.shape[2:], B.stride(),
        C.stride(), kind(D), kind(bias), kind(initial),
        None if cu_seqlens is None else (cu_seqlens.dtype, cu_seqlens.shape[0]), softplus, low, high,
    )  # fmt: skip


def _plan(given: tuple[str, ...], x: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> Plan:
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Plan(given, x.unsqueeze(2), B.unsqueeze(2), n_seq, packed=cu_seqlens is not None, gated=False)


def _steps(plan: Plan, dt: Tensor, bias: Tensor | None, options: tuple[bool, float, float]) -> dict[str, Any]:
    """Add what writes `vec`, the steps and their sums; returns the numbers of kernels that read dt."""
    softplus, low, high = options
    more = {**narrow_strides(dt=dt), "low": low, "high": high, "SOFTPLUS": softplus, "BIAS": bias is not None}
    plan.add_vec()
    plan.launch(gpu_steps.steps_kernel, plan.narrow_grid, ("dt", "bias", "A", "vec", plan.table), more)
    return more


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format), _initial(x, B, initial, n_seq)
    options = (softplus, low, high)
    x, B, C = as_rows(x, x.dtype), as_rows(B, x.dtype), as_rows(C, x.dtype)
    A = A.contiguous()
    D, dt_bias, initial = (None if t is None else t.contiguous() for t in (D, dt_bias, initial))

    def make() -> Plan:
        plan = _plan(FORWARD, x, B, cu_seqlens)
        if cu_seqlens is None and x.shape[1] <= STEP_TOKENS:
            _few(plan, x, dt, B, C, D, dt_bias, initial, options)
            return plan
        _steps(plan, dt, dt_bias, options)
        x_, k_, q_ = (Named(name, t.unsqueeze(2)) for name, t in (("x", x), ("k", B), ("q", C)))
        plan.forward(x_, k_, q_, D, None if initial is None else "initial")
        return plan

    key = _key("ssd", x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, *options)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = torch.empty((n_seq, *x.shape[2:], B.shape[3]), dtype=torch.float32, device=x.device)
    plans.of(key, make).program(x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, y, final)
    return y, final


def _few(
    plan: Plan,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    options: tuple[bool, float, float],
) -> None:
    """Add the same for a few tokens."""
    softplus, low, high = options
    # more rows a program are fewer instructions; fewer fill the device
    wide = plan.rows * plan.heads * plan.width // 16 >= 4 * multiprocessors(plan.device)
    rows = min(power_of_2(plan.width), 16 if wide else 8)
    slices = cdiv(plan.width, rows)
    more = {
        "SLICES": slices,
        **{f"x_{letter}": n for letter, n in zip("sth", x.stride()[:3], strict=True)},
        **narrow_strides(dt=dt),
        **{f"B_{letter}": n for letter, n in zip("stg", B.stride()[:3], strict=True)},
        **{f"C_{letter}": n for letter, n in zip("stg", C.stride()[:3], strict=True)},
        "low": low,
        "high": high,
        "SOFTPLUS": softplus,
        "BIAS": bias is not None,
        "PB": rows,
        "NB": power_of_2(plan.state),
        "SKIP": 0 if D is None else D.dim(),
        "GIVEN": initial is not None,
    }
    grid = (plan.rows * plan.heads * slices, 1, 1)
    names = ("x", "dt", "A", "k", "q", "D", "bias", "initial", "final", "y")
    plan.launch(gpu_step.step_kernel, grid, names, more, Tuning(warps=4, stages=1))


def _backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state; empty for what was not given."""
    if x.numel() == 0:
        of = (x, dt, A, B, C, D, dt_bias)
        dinitial = None if initial is None else _initial(x, B, dfinal, initial.shape[0]).to(initial.dtype)
        zeros = (None if t is None else torch.zeros_like(t) for t in of)
        return (*(none_is_empty(x, g) for g in zeros), none_is_empty(x, dinitial))  # type: ignore[return-value]
    options = (softplus, low, high)
    dy = torch.zeros_like(x) if dy is None else as_rows(dy, x.dtype)
    given = (B.dtype, C.dtype)
    x, B, C = as_rows(x, x.dtype), as_rows(B, x.dtype), as_rows(C, x.dtype)
    A = A.contiguous()
    D, dt_bias, initial = (None if t is None else t.contiguous() for t in (D, dt_bias, initial))
    dfinal = None if dfinal is None else dfinal.contiguous()

    def make() -> Plan:
        plan = _plan(BACKWARD, x, B, cu_seqlens)
        narrow = _steps(plan, dt, dt_bias, options)
        dy_, x_, k_, q_ = (
            Named(name, t.unsqueeze(2)) for name, t in (("dy", dy), ("x", x), ("k", B), ("q", C))
        )
        entering = None if initial is None else "initial"
        plan.backward(dy_, x_, k_, q_, D, entering, None if dfinal is None else "dfinal")
        skip = 0 if D is None else D.dim()
        plan.program.memory("sums", 3, plan.blocks, plan.heads)
        names = ("rows", "inner", "vec", "dt", "bias", "A", plan.table, "ddt", "sums")
        more = {**narrow, "SKIP": skip}
        plan.launch(gpu_steps.steps_gradient_kernel, plan.narrow_grid, names, more)
        of_bias, of_D = None if dt_bias is None else "dbias", "dD" if skip == 1 else None
        plan.totals("sums", plan.blocks, plan.heads, "dA", of_bias, of_D)
        if skip == 2:
            plan.skip_gradient(x_, dy_)
        return plan

    key = _key("ssd backward", x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, *options)
    grads = [None if t is None else new_like(t) for t in (x, dt, A, B, C, D, dt_bias, initial)]
    plan = plans.of((*key, dy.stride(), kind(dfinal)), make)
    plan.program(x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, dy, dfinal, *grads)
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = (none_is_empty(x, g) for g in grads)
    return dx, ddt, dA, dB.to(given[0]), dC.to(given[1]), dD, dbias, dinitial


def _fake(x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, *_):  # type: ignore[no-untyped-def]
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(n_seq, *x.shape[2:], B.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), final


def _fake_backward(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial, *_):  # type: ignore[no-untyped-def]
    of = (x, dt, A, B, C, D, dt_bias, initial)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in of)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    grads = backward(dy, dfinal, *given, *ctx.options)
    of = (None if t is None else grad for t, grad in zip(given, grads, strict=False))
    return (*of, *(None for _ in range(4)))


SSD = KernelOp(
    "ssd_gpu", _forward, _backward, fake=_fake, fake_backward=_fake_backward, save=_save, gradients=_gradients
)


def _initial(x: Tensor, B: Tensor, given: Tensor | None, n_seq: int) -> Tensor:
    """A float32 copy of the given states, or zeros."""
    if given is not None:
        return given.to(torch.float32, copy=True)
    return x.new_zeros(n_seq, *x.shape[2:], B.shape[3], dtype=torch.float32)
