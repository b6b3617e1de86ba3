"""Mamba-3 on GPUs, SISO and MIMO, as a torch op: the same kernels as Mamba-2's, with gated pairs and rows by rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.ops.ssd import gpu_backward, gpu_forward
from plait.ops.ssd.gpu_engine import Plan, as_dense, as_rows, narrow_strides, none_is_empty, plan_of
from plait.ops.ssd.resume import States, finished, given_or_zeros, resumed
from plait.ops.triton_support import KernelOp, on_device


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


def _plan(
    kind: str, x: Tensor, k: Tensor, others: tuple[Tensor | None, ...], cu_seqlens: Tensor | None
) -> Plan:
    def make() -> Plan:
        n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return Plan(x, k, n_seq, packed=cu_seqlens is not None, gated=True)

    return plan_of(kind, (x, k, *others, cu_seqlens), make)


def _gates(plan: Plan, a: Tensor, dt: Tensor, lam: Tensor, table: Tensor | None) -> Tensor:
    """`vec`: sums of decays, weights, gates."""
    vec = plan.new_vec()
    plan.launch(
        "gates",
        gpu_forward.gates_kernel,
        plan.narrow_grid(),
        (a, dt, lam, vec, table),
        lambda: narrow_strides(a=a, dt=dt, lam=lam),
    )
    return vec


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
    x, k, q = (as_rows(t, x.dtype) for t in (x, k, q))
    D, initial = as_dense(D), as_dense(initial)
    with on_device(x):
        plan = _plan("trapezoid", x, k, (q, log_decay, dt, lam, D, initial), cu_seqlens)
        table = plan.table(cu_seqlens)
        vec = _gates(plan, log_decay, dt, lam, table)
        return plan.forward(x, k, q, vec, D, table, initial, cu_seqlens)


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
    x, k, q = (as_rows(t, x.dtype) for t in (x, k, q))
    dfinal, D, initial = as_dense(dfinal), as_dense(D), as_dense(initial)
    with on_device(x):
        others = (q, log_decay, dt, lam, D, initial, dy, dfinal)
        plan = _plan("trapezoid backward", x, k, others, cu_seqlens)
        table = plan.table(cu_seqlens)
        vec = _gates(plan, log_decay, dt, lam, table)
        dx, dk, dq, dinitial, rows, inner = plan.backward(
            dy, dfinal, x, k, q, vec, D, table, initial, cu_seqlens
        )
        da = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
        ddt, dlam = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dt, lam))
        dw, dg = plan.empty(2, *dt.shape)
        sums = plan.empty(plan.blocks, plan.heads)
        plan.launch(
            "gates gradient",
            gpu_backward.gates_gradient_kernel,
            plan.narrow_grid(),
            (rows, inner, vec, table, da, dw, dg, sums),
            lambda: {"SKIP": 0 if D is None else D.dim()},
        )
        plan.launch(
            "gates input",
            gpu_backward.gates_input_kernel,
            plan.narrow_grid(),
            (dw, dg, dt, lam, table, ddt, dlam),
            lambda: narrow_strides(dt=dt, lam=lam),
        )
        dD = None if D is None else sums.sum(0).to(D.dtype)
    return dx, dk, dq, da, ddt, dlam, none_is_empty(x, dD), none_is_empty(x, dinitial)


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
