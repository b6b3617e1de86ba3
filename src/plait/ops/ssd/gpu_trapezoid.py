"""Mamba-3 on GPUs, SISO and MIMO, as a torch op: the same kernels as Mamba-2's, with gated pairs and rows by rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.ssd import gpu_steps
from plait.ops.ssd.gpu_engine import (
    Named,
    Plan,
    as_rows,
    kind,
    narrow_strides,
    new_like,
    none_is_empty,
    plans,
)
from plait.ops.ssd.resume import States, finished, given_or_zeros, resumed
from plait.ops.triton_support import KernelOp


def trapezoidal_ssd(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    lam: Tensor,
    *,
    rank_in: Tensor | None,
    D: Tensor | None,
    initial_state: States | None,
    cu_seqlens: Tensor | None,
    max_len: int | None,
) -> tuple[Tensor, States]:
    """Mamba-3's recurrence; shapes as in `plait.ops.ssd.trapezoidal_ssd`. v is float32, bfloat16 or float16.

    Products are of v's dtype, in which k and q are taken too; states and decays are float32.
    """
    (n_row, length), rank = v.shape[:2], k.shape[2]
    n_seq = n_row if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = v.unsqueeze(2)
    if rank_in is not None:
        rows = (rows * rank_in.transpose(0, 1)).to(v.dtype)
    elif rank > 1:
        rows = rows.expand(-1, -1, rank, -1, -1)
    if n_row * length == 0 or n_seq == 0:
        ssm, last_k, last_v = given_or_zeros(initial_state, v, k, n_seq)
        return rows.clone(), (ssm.clone(), last_k.clone(), last_v.clone())
    initial, entering = None, None
    if initial_state is not None:
        initial = given_or_zeros(initial_state, v, k, n_seq)
        entering = resumed(initial, dt, lam, rank_in, cu_seqlens)
    k, q = k.to(v.dtype), q.to(v.dtype)
    o, final = TRAPEZOID(rows, k, q, log_decay, dt, lam, D, entering, cu_seqlens)
    if cu_seqlens is not None and initial is None:
        initial = given_or_zeros(None, v, k, n_seq)
    return o, finished(final, v, k, initial, cu_seqlens)  # type: ignore[arg-type]


FORWARD = ("x", "k", "q", "a", "dt", "lam", "D", "initial", "cu", "y", "final")
BACKWARD = (
    "x", "k", "q", "a", "dt", "lam", "D", "initial", "cu", "dy", "dfinal",
    "dx", "dk", "dq", "da", "ddt", "dlam", "dD", "dinitial",
)  # fmt: skip
"""Tensors of a call by the kernels' names for them."""


def _key(
    what: str, x: Tensor, k: Tensor, q: Tensor, a: Tensor, dt: Tensor, lam: Tensor, D: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """All that a plan depends on."""
    return (
        what, x.device, x.dtype, x.shape, x.stride(), k.shape[4], k.stride(), q.stride(), a.dtype, a.stride(),
        dt.dtype, dt.stride(), lam.dtype, lam.stride(), kind(D), kind(initial),
        None if cu_seqlens is None else (cu_seqlens.dtype, cu_seqlens.shape[0]),
    )  # fmt: skip


def _plan(
    given: tuple[str, ...],
    x: Tensor,
    k: Tensor,
    a: Tensor,
    dt: Tensor,
    lam: Tensor,
    cu_seqlens: Tensor | None,
) -> Plan:
    """A plan that has written `vec`: sums of decays, weights, gates."""
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan = Plan(given, x, k, n_seq, packed=cu_seqlens is not None, gated=True)
    plan.add_vec()
    names = ("a", "dt", "lam", "vec", plan.table)
    plan.launch(gpu_steps.gates_kernel, plan.narrow_grid, names, narrow_strides(a=a, dt=dt, lam=lam))
    return plan


def _forward(
    x: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    lam: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o and the final states, from x (S, T, R, H, P), k, q (S, T, R, H, N), all of one dtype."""
    x, k, q = as_rows(x, x.dtype), as_rows(k, x.dtype), as_rows(q, x.dtype)
    D = None if D is None else D.contiguous()
    initial = None if initial is None else initial.contiguous()

    def make() -> Plan:
        plan = _plan(FORWARD, x, k, log_decay, dt, lam, cu_seqlens)
        initial_name = None if initial is None else "initial"
        plan.forward(Named("x", x), Named("k", k), Named("q", q), D, initial_name)
        return plan

    plan = plans.of(_key("trapezoid", x, k, q, log_decay, dt, lam, D, initial, cu_seqlens), make)
    y = new_like(x)
    final = torch.empty((plan.n_seq, *x.shape[3:], k.shape[4]), dtype=torch.float32, device=x.device)
    plan.program(x, k, q, log_decay, dt, lam, D, initial, cu_seqlens, y, final)
    return y, final


def _backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    lam: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, k, q, log_decay, dt, lam, D and the initial state; empty for what was not given."""
    dy = torch.zeros_like(x) if dy is None else as_rows(dy, x.dtype)
    x, k, q = as_rows(x, x.dtype), as_rows(k, x.dtype), as_rows(q, x.dtype)
    dfinal, D, initial = (None if t is None else t.contiguous() for t in (dfinal, D, initial))

    def make() -> Plan:
        plan = _plan(BACKWARD, x, k, log_decay, dt, lam, cu_seqlens)
        wide = Named("dy", dy), Named("x", x), Named("k", k), Named("q", q)
        entering = None if initial is None else "initial"
        plan.backward(*wide, D, entering, None if dfinal is None else "dfinal")
        for name in ("dw", "dg"):
            plan.program.memory(name, *dt.shape)
        plan.program.memory("sums", plan.blocks, plan.heads)
        names: tuple[str | None, ...] = ("rows", "inner", "vec", plan.table, "da", "dw", "dg", "sums")
        skip = {"SKIP": 0 if D is None else D.dim()}
        plan.launch(gpu_steps.gates_gradient_kernel, plan.narrow_grid, names, skip)
        names = ("dw", "dg", "dt", "lam", plan.table, "ddt", "dlam")
        strides = narrow_strides(dt=dt, lam=lam)
        plan.launch(gpu_steps.gates_input_kernel, plan.narrow_grid, names, strides)
        if D is not None:
            plan.totals("sums", plan.blocks, plan.heads, "dD")
        return plan

    key = _key("trapezoid backward", x, k, q, log_decay, dt, lam, D, initial, cu_seqlens)
    grads = [None if t is None else new_like(t) for t in (x, k, q, log_decay, dt, lam, D, initial)]
    plan = plans.of((*key, dy.stride(), kind(dfinal)), make)
    plan.program(x, k, q, log_decay, dt, lam, D, initial, cu_seqlens, dy, dfinal, *grads)
    dx, dk, dq, da, ddt, dlam, dD, dinitial = (none_is_empty(x, g) for g in grads)
    return dx, dk, dq, da, ddt, dlam, dD, dinitial


def _fake(x, k, q, log_decay, dt, lam, D, initial, cu_seqlens):  # type: ignore[no-untyped-def]
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(n_seq, *x.shape[3:], k.shape[4], dtype=torch.float32)


def _fake_backward(dy, dfinal, x, k, q, log_decay, dt, lam, D, initial, cu_seqlens):  # type: ignore[no-untyped-def]
    of = (x, k, q, log_decay, dt, lam, D, initial)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in of)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    grads = backward(dy, dfinal, *given)
    return (*(None if t is None else grad for t, grad in zip(given, grads, strict=False)), None)


TRAPEZOID = KernelOp(
    "trapezoidal_ssd_gpu",
    _forward,
    _backward,
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
