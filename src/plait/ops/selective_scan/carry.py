"""The pass of a diagonal state over chunks: S <- decay_c * S + local_c, forward and adjoint, by hand.

Written by hand because autograd through a slice a step makes the backward quadratic in the number of chunks, and
because a packed row wants one pass over its C chunks (a chunk that begins a document takes the document's initial
state) instead of the longest document's number of chunks times all documents.

    S sequences, C chunks (dense: chunk c is number c % K of sequence c // K), * the state's own dimensions.
`run_forward` and `run_backward` record no gradients; `carry_states` does. Complex tensors are welcome.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.chunks import Plan


class Route(NamedTuple):
    """Which state enters which chunk. For dense input all four are None: every row runs through its K chunks."""

    first: Tensor | None
    """(C,) bool, packed: the chunk begins a sequence"""
    owner: Tensor | None
    """(C,) packed: the sequence of the chunk"""
    ends: Tensor | None
    """(2, S) packed: each sequence's first and last chunk (any chunk if it has none)"""
    filled: Tensor | None
    """(S,) bool, packed: the sequence has a chunk"""


def chunk_size(x: Tensor, longest: int, most: int) -> int:
    """Tokens a chunk for x (S, T, E): `most`, or the power of two that holds the longest sequence if that is less.

    In a graph the sizes of x become constants here (`range` does that): a symbolic number of chunks would make
    tracing many times slower, and is fixed later anyway. `longest` is only compared, so it may stay a symbol.
    """
    size, room = 1, min(len(range(x.shape[1])), most) if range(x.shape[0]) else 1
    while size < room and size < longest:
        size *= 2
    return size


def make_route(plan: Plan) -> Route:
    """Read the route off the index maps of `plan_chunks`."""
    if plan.turn is None or plan.chunk is None or plan.live is None:
        return Route(None, None, None, None)
    k = plan.turn // plan.n_seq
    begin = plan.chunk[0]
    end = (begin + plan.live.sum(0) - 1).clamp(min=0)
    return Route(k == 0, plan.turn - k * plan.n_seq, torch.stack([begin, end]), plan.live[0])


def run_forward(decay: Tensor, local: Tensor, initial: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """decay, local (C, *), initial (S, *) -> the state entering each chunk (C, *), the final states (S, *).

    A sequence without chunks keeps its initial state bit for bit.
    """
    entering = []
    if route.first is None or route.owner is None or route.ends is None or route.filled is None:
        rows = initial.shape[0]
        state = initial
        for d, add in zip(_steps(decay, rows), _steps(local, rows), strict=True):
            entering.append(state)
            state = torch.addcmul(add, d, state)
        return torch.stack(entering, 1).flatten(0, 1), state
    starts = initial.index_select(0, route.owner).unbind(0)
    state = torch.zeros_like(starts[0])
    for first, start, d, add in zip(
        route.first.unbind(0), starts, decay.unbind(0), local.unbind(0), strict=True
    ):
        state = torch.where(first, start, state)
        entering.append(state)
        state = torch.addcmul(add, d, state)
    # What leaves a chunk is recomputed for the last chunks alone: S of them instead of a second stack of C.
    stacked = torch.stack(entering)
    last = route.ends[1]
    final = torch.addcmul(
        local.index_select(0, last), decay.index_select(0, last), stacked.index_select(0, last)
    )
    return stacked, torch.where(_like(route.filled, final), final, initial)


def run_backward(decay: Tensor, entering: Tensor, final: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """The adjoint pass: gradients with respect to what `run_forward` returned, (C, *) and (S, *).

    Returns the gradient of the state that leaves each chunk (C, *), which is that of `local`, and of `initial`.
    """
    leaving = []
    if route.first is None or route.owner is None or route.ends is None or route.filled is None:
        rows = final.shape[0]
        grad = final
        for d, add in zip(_steps(decay, rows)[::-1], _steps(entering, rows)[::-1], strict=True):
            leaving.append(grad)
            grad = torch.addcmul(add, d.conj(), grad)
        return torch.stack(leaving[::-1], 1).flatten(0, 1), grad
    begin, end = route.ends[0], route.ends[1]
    given = torch.where(_like(route.filled, final), final, 0)
    # index_add: sequences without a chunk share an index with others and add zero
    ends = torch.zeros_like(entering).index_add_(0, end, given)
    grad = torch.zeros_like(entering[0])
    total = []
    steps = list(zip(route.first.unbind(0), decay.unbind(0), entering.unbind(0), ends.unbind(0), strict=True))
    for first, d, add, last in reversed(steps):
        grad = grad + last
        leaving.append(grad)
        grad = torch.addcmul(add, d.conj(), grad)
        total.append(grad)
        grad = grad.masked_fill(first, 0)
    start = torch.stack(total[::-1]).index_select(0, begin)
    return torch.stack(leaving[::-1]), torch.where(_like(route.filled, start), start, final)


def carry_states(decay: Tensor, local: Tensor, initial: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """`run_forward`, differentiable in its three tensors; see there."""
    entering, final = _CarryStates.apply(decay, local, initial, *route)
    return entering, final


class _CarryStates(torch.autograd.Function):
    """(decay, local, initial, *route) -> (entering, final)."""

    @staticmethod
    def forward(
        ctx: Any,
        decay: Tensor,
        local: Tensor,
        initial: Tensor,
        first: Tensor | None,
        owner: Tensor | None,
        ends: Tensor | None,
        filled: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        entering, final = run_forward(decay, local, initial, Route(first, owner, ends, filled))
        ctx.save_for_backward(decay, entering, first, owner, ends, filled)
        return entering, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        decay, entering, *route = ctx.saved_tensors
        leaving, initial = run_backward(decay, grads[0], grads[1], Route(*route))
        return leaving * entering.conj(), leaving, initial, None, None, None, None


def _steps(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """(S*K, *) to K tensors (S, *)."""
    return x.unflatten(0, (rows, x.shape[0] // rows)).unbind(1)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *(1,) * (x.dim() - 1))
