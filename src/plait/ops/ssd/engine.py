"""The chunk engine under Mamba-2 and Mamba-3: a gated outer-product recurrence as a few batched matmuls.

    S_t = exp(a_t) S_{t-1} + sum_r w_t x_{t,r} k_{t,r}^T
    y_{t,r} = S_t q_{t,r} + D x_{t,r}                                               (`diagonal` None: Mamba-2)
    y_{t,r} = (exp(a_t) S_{t-1} + sum_s d_t x_{t,s} k_{t,s}^T) q_{t,r} + D x_{t,r}  (`diagonal` d: Mamba-3)

Within a chunk, with c the running sum of a, y is (L o q k^T) x, L_ij = exp(c_i - c_j) w_j under a causal mask;
between chunks only S is carried (state space duality, arXiv 2405.21060, section 6). The gradient is written by
hand: it computes the tiles again and keeps only the inputs and one state a chunk. `blocks.py` has the layouts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.ops.chunks import Plan, compute_dtype, no_autocast
from plait.ops.ssd.blocks import Maps, Run, Sizes
from plait.ops.ssd.narrow import NarrowGrads
from plait.ops.ssd.sweep import plan_visits, sweep


def chunk_scan(
    x: Tensor,
    k: Tensor,
    q: Tensor,
    a: Tensor,
    w: Tensor,
    plan: Plan,
    *,
    diagonal: Tensor | None = None,
    skip: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence at the head of this file over all sequences of `plan`.

    x (n, R, H, P); k, q (n, R, G, N), head h uses group h // (H/G); a (n, H) <= 0; w (n, H); diagonal (n, H), or
    None if R is 1; skip D (H) or None; initial (S, H, P, N) or None for zeros. n counts the tokens of all
    sequences. Returns y (n, R, H, P) in x.dtype and the final states (S, H, P, N) in float32 (float64 for
    float64 x). Differentiable once in every tensor.
    """
    heads, width, groups, state = x.shape[2], x.shape[3], k.shape[2], k.shape[3]
    dtype = compute_dtype(x)
    if initial is None:
        initial = x.new_zeros(plan.n_seq, heads, width, state, dtype=dtype)
    initial = initial.to(dtype)
    if plan.count == 0:
        return x.clone(), initial.clone()
    entering = initial.reshape(plan.n_seq, groups, heads // groups, width, state).permute(0, 1, 4, 2, 3)
    entering = entering.reshape(plan.n_seq, groups, state, -1)
    gather, slot, scatter = plan.token, plan.slot, None
    if plan.valid is not None:
        if gather is None or slot is None:
            gather, slot = _dense_maps(plan, x.device)
        scatter = torch.where(plan.valid.reshape(-1), gather, x.shape[0])
    maps = Maps(gather, scatter, plan.valid, slot, *plan_visits(plan))
    sizes = Sizes(plan.size, plan.steps, plan.count, plan.n_seq, plan.length)
    diagonal = None if diagonal is None else diagonal.to(dtype)
    skip = None if skip is None else skip.to(dtype)
    y, final = _ChunkScan.apply(x, k, q, a.to(dtype), w.to(dtype), diagonal, skip, entering, sizes, *maps)
    final = final.reshape(plan.n_seq, groups, state, heads // groups, width).permute(0, 1, 3, 4, 2)
    return y, final.reshape(plan.n_seq, heads, width, state)


def _dense_maps(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token of each slot and slot of each token, for dense sequences whose last chunk has pads."""
    sequence = torch.arange(plan.n_seq, device=device).unsqueeze(1)
    inside = torch.arange(plan.steps * plan.size, device=device).clamp(max=plan.length - 1)
    gather = sequence * plan.length + inside
    slot = sequence * (plan.steps * plan.size) + torch.arange(plan.length, device=device)
    return gather.view(-1), slot.view(-1)


class _ChunkScan(torch.autograd.Function):
    """The chunked forward and its gradient; arguments as `chunk_scan` prepares them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        k: Tensor,
        q: Tensor,
        a: Tensor,
        w: Tensor,
        diagonal: Tensor | None,
        skip: Tensor | None,
        initial: Tensor,
        sizes: Sizes,
        *indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        maps = Maps(*indices)
        with no_autocast(x):
            run = Run(x, k, a, w, diagonal, skip, sizes, maps)
            states = run.new_states()
            for lo, hi in run.blocks():
                xb, kb = run.heads(x, lo, hi, "x"), run.grouped(k, lo, hi, "k")
                xe = run.scaled(xb, run.to_end[lo:hi], "x to end")
                run.store(states, kb.mT, xe, lo, hi)
            final = sweep(states, run.chunk_decay, initial, sizes, maps)
            y = run.new_output(x)
            for lo, hi in run.blocks():
                xb, kb, qb = (
                    run.heads(x, lo, hi, "x"),
                    run.grouped(k, lo, hi, "k"),
                    run.grouped(q, lo, hi, "q"),
                )
                tile, _, _ = run.tile(qb, kb, lo, hi)
                tile = tile.view(-1, run.rows, run.rows)
                within = run.from_heads(run.bmm(tile, run.to_heads(xb, "x heads"), "within"))
                across = run.from_groups(run.bmm(qb, run.load(states, lo, hi), "across"))
                yb = run.into("y", xb.shape, torch.addcmul, within, across, run.from_begin[lo:hi])
                run.put(y, yb, lo, hi)
        ctx.save_for_backward(x, k, q, a, w, diagonal, skip, states, *indices)
        ctx.sizes = sizes
        return run.finish(y), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dy, dfinal = grads
        x, k, q, a, w, diagonal, skip, states, *indices = ctx.saved_tensors
        sizes, maps = ctx.sizes, Maps(*indices)
        with no_autocast(x):
            run = Run(x, k, a, w, diagonal, skip, sizes, maps)
            # the gradient of the state that leaves each chunk, by the same sweep backwards
            leaving = run.new_states()
            for lo, hi in run.blocks():
                dyb, qb = run.heads(dy, lo, hi, "dy"), run.grouped(q, lo, hi, "q")
                dacross = run.scaled(dyb, run.from_begin[lo:hi], "dy from begin")
                run.store(leaving, qb.mT, dacross, lo, hi)
            dinitial = sweep(leaving, run.chunk_decay, dfinal, sizes, maps, reverse=True)

            dx, dk, dq = run.new_output(x), run.new_output(k), run.new_output(q)
            narrow = NarrowGrads(run)
            for lo, hi in run.blocks():
                xb, dyb = run.heads(x, lo, hi, "x"), run.heads(dy, lo, hi, "dy")
                kb, qb = run.grouped(k, lo, hi, "k"), run.grouped(q, lo, hi, "q")
                enter, leave = run.load(states, lo, hi), run.load(leaving, lo, hi)
                # within the chunks
                dyh = run.to_heads(dyb, "dy heads")
                tile, products, decay = run.tile(qb, kb, lo, hi)
                dtile = run.bmm(dyh, run.to_heads(xb, "x heads").mT, "dtile").view_as(tile)
                dx_within = run.bmm(tile.view(-1, run.rows, run.rows).mT, dyh, "x heads")
                dproducts = narrow.within(dtile, products, decay, lo, hi)
                # through the states that enter the chunks
                dacross = run.scaled(dyb, run.from_begin[lo:hi], "scaled")
                narrow.entering_paths(dacross, run.bmm(qb, enter, "product"))
                dqb = torch.baddbmm(torch.bmm(dproducts, kb), dacross, enter.mT)
                # through the states that leave them
                xe = run.scaled(xb, run.to_end[lo:hi], "scaled")
                dkb = torch.baddbmm(torch.bmm(dproducts.mT, qb), xe, leave.mT)
                dxe = run.from_groups(run.bmm(kb, leave, "product"))
                narrow.leaving_paths(xb, dxe, enter, leave, lo, hi)
                dx_within = run.from_heads(dx_within)
                dxb = run.into("scaled", xb.shape, torch.addcmul, dx_within, dxe, run.to_end[lo:hi])
                run.put(dx, dxb, lo, hi)
                run.put(dk, run.ungrouped(dkb), lo, hi)
                run.put(dq, run.ungrouped(dqb), lo, hi)
            da, dw, ddiagonal, dskip = narrow.finish()
        wide = run.finish(dx), run.finish(dk), run.finish(dq)
        return (*wide, da, dw, ddiagonal, dskip, dinitial, None, *(None for _ in indices))
