"""Mamba-2 on GPUs, as a torch op: the Triton kernels that `gpu_engine.py` launches, and `gpu_step.py` for decoding.

The forward pass is two launches, backward nine; six more in all where sequences are cut into pieces. Nothing but the
inputs is kept for backward. The order of every sum is fixed: two runs are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.ssd import gpu_backward, gpu_forward, gpu_step
from plait.ops.ssd.gpu_engine import Plan, Tuning, as_dense, as_rows, narrow_strides, none_is_empty, plan_of
from plait.ops.triton_support import KernelOp, cdiv, multiprocessors, on_device, power_of_2

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


def _plan(
    kind: str,
    x: Tensor,
    B: Tensor,
    others: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    options: tuple[Any, ...],
) -> Plan:
    def make() -> Plan:
        n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return Plan(x.unsqueeze(2), B.unsqueeze(2), n_seq, packed=cu_seqlens is not None, gated=False)

    return plan_of((kind, options), (x, B, *others, cu_seqlens), make)


def _steps(
    plan: Plan, dt: Tensor, bias: Tensor | None, A: Tensor, table: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """`vec`: the steps and their sums."""
    vec = plan.new_vec()
    plan.launch(
        "steps",
        gpu_forward.steps_kernel,
        plan.narrow_grid(),
        (dt, bias, A, vec, table),
        lambda: {**narrow_strides(dt=dt), **_step_options(options, bias)},
    )
    return vec


def _step_options(options: tuple[Any, ...], bias: Tensor | None) -> dict[str, Any]:
    softplus, low, high = options
    return {"low": low, "high": high, "SOFTPLUS": softplus, "BIAS": bias is not None}


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
    D, initial = as_dense(D), as_dense(initial)
    with on_device(x):
        plan = _plan("ssd", x, B, (C, dt, A, D, dt_bias, initial), cu_seqlens, options)
        if cu_seqlens is None and x.shape[1] <= STEP_TOKENS:
            return _few(plan, x, dt, A, B, C, D, dt_bias, initial, options)
        table = plan.table(cu_seqlens)
        vec = _steps(plan, dt, dt_bias, A, table, options)
        x, B, C = x.unsqueeze(2), B.unsqueeze(2), C.unsqueeze(2)
        y, final = plan.forward(x, B, C, vec, D, table, initial, cu_seqlens)
    return y.squeeze(2), final


def _few(
    plan: Plan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """The same, for a few tokens."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = plan.empty(plan.n_seq, plan.heads, plan.width, plan.state)
    # more rows a program are fewer instructions; fewer fill the device
    wide = plan.rows * plan.heads * plan.width // 16 >= 4 * multiprocessors(plan.device)
    rows = min(power_of_2(plan.width), 16 if wide else 8)
    slices = cdiv(plan.width, rows)
    B_strides, C_strides = (
        {f"{name}_{letter}": n for letter, n in zip("stg", t.stride()[:3], strict=True)}
        for name, t in (("B", B), ("C", C))
    )
    plan.launch(
        "few",
        gpu_step.step_kernel,
        (plan.rows * plan.heads * slices, 1, 1),
        (x, dt, A, B, C, D, bias, initial, final, y),
        lambda: {
            "SLICES": slices,
            **{f"x_{letter}": n for letter, n in zip("sth", x.stride()[:3], strict=True)},
            **narrow_strides(dt=dt),
            **B_strides,
            **C_strides,
            **_step_options(options, bias),
            "PB": rows,
            "NB": power_of_2(plan.state),
            "SKIP": 0 if D is None else D.dim(),
            "GIVEN": initial is not None,
        },
        Tuning(warps=4, stages=1),
    )
    return y, final


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
    dinitial: Tensor | None
    if x.numel() == 0:
        of = (x, dt, A, B, C, D, dt_bias)
        dinitial = None if initial is None else _initial(x, B, dfinal, initial.shape[0])
        grads = (None if t is None else torch.zeros_like(t) for t in of)
        return (*(none_is_empty(x, g) for g in grads), none_is_empty(x, dinitial))  # type: ignore[return-value]
    options = (softplus, low, high)
    dy = torch.zeros_like(x) if dy is None else as_rows(dy, x.dtype)
    given = (B.dtype, C.dtype)
    x, B, C = as_rows(x, x.dtype), as_rows(B, x.dtype), as_rows(C, x.dtype)
    dfinal, D, initial = as_dense(dfinal), as_dense(D), as_dense(initial)
    with on_device(x):
        others = (C, dt, A, D, dt_bias, initial, dy, dfinal)
        plan = _plan("ssd backward", x, B, others, cu_seqlens, options)
        table = plan.table(cu_seqlens)
        vec = _steps(plan, dt, dt_bias, A, table, options)
        x, B, C, dy = x.unsqueeze(2), B.unsqueeze(2), C.unsqueeze(2), dy.unsqueeze(2)
        dx, dB, dC, dinitial, rows, inner = plan.backward(
            dy, dfinal, x, B, C, vec, D, table, initial, cu_seqlens
        )
        ddt = torch.empty_like(dt, memory_format=torch.contiguous_format)
        sums = plan.empty(3, plan.blocks, plan.heads)
        plan.launch(
            "steps gradient",
            gpu_backward.steps_gradient_kernel,
            plan.narrow_grid(),
            (rows, inner, vec, dt, dt_bias, A, table, ddt, sums),
            lambda: {
                **narrow_strides(dt=dt),
                **_step_options(options, dt_bias),
                "SKIP": 0 if D is None else D.dim(),
            },
        )
        dA, dbias = sums[0].sum(0), None if dt_bias is None else sums[1].sum(0)
        dD = None
        if D is not None:
            dD = plan.skip_gradient(x, dy) if D.dim() == 2 else sums[2].sum(0)
    return (
        dx.squeeze(2),
        ddt,
        dA.to(A.dtype),
        dB.squeeze(2).to(given[0]),
        dC.squeeze(2).to(given[1]),
        none_is_empty(x, None if dD is None or D is None else dD.to(D.dtype)),
        none_is_empty(x, None if dbias is None or dt_bias is None else dbias.to(dt_bias.dtype)),
        none_is_empty(x, None if dinitial is None or initial is None else dinitial.to(initial.dtype)),
    )


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
