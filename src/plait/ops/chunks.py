"""Which token sits in which chunk: the index maps shared by the chunked (portable) ops.

A sequence is cut into chunks of Q tokens, the last one padded; a chunk never holds two sequences. Dense input
(S, T, ...) is reshaped; packed input (1, n, ...) is gathered, with C <= n // Q + S chunks, a bound that does not
depend on the data, so that nothing is read back from the device. Splitting and joining are permutations, so the
gradient of either is the gather of the other: no scattered additions, and deterministic.

    S sequences, T tokens each (dense), n tokens (packed), Q tokens a chunk, C chunks, K chunks of the longest
    sequence. Dense chunk c is chunk c % K of sequence c // K.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Plan:
    """The index maps of one layout and chunk size. Tensors are None where the dense reshape needs none."""

    size: int
    """Q, tokens a chunk"""
    n_seq: int
    """S, sequences"""
    length: int
    """T (dense) or n (packed)"""
    steps: int
    """K, chunks of the longest sequence (packed: a host bound of it)"""
    count: int
    """C, chunks; packed: an upper bound, the last ones may be empty"""
    token: Tensor | None
    """(C*Q,) packed: the token in each slot; pads repeat the last token of their own sequence"""
    valid: Tensor | None
    """(C, Q) bool: which slots hold a token; None when all do"""
    slot: Tensor | None
    """(n,) packed: the slot of each token"""
    chunk: Tensor | None
    """(K, S) packed: the chunk that is number k of sequence s (any chunk where there is none)"""
    live: Tensor | None
    """(K, S) bool, packed: whether sequence s has a chunk number k"""
    turn: Tensor | None
    """(C,) packed: k * S + s of each chunk"""


def plan_chunks(x: Tensor, size: int, cu_seqlens: Tensor | None = None, max_len: int | None = None) -> Plan:
    """Make the maps for x (S, T, ...), or (1, n, ...) with cu_seqlens (S+1,) from 0 to n.

    `max_len` is a host upper bound of the packed lengths (None: n); it need not be tight, but it must not be less.
    """
    if cu_seqlens is None:
        n_seq, length = x.shape[0], x.shape[1]
        steps = -(-length // size)
        count = n_seq * steps
        valid = None
        if length % size:
            inside = torch.arange(steps * size, device=x.device) < length
            valid = inside.view(1, steps, size).expand(n_seq, steps, size).reshape(count, size)
        return Plan(size, n_seq, length, steps, count, None, valid, None, None, None, None)

    n_seq, length = cu_seqlens.shape[0] - 1, x.shape[1]
    steps = -(-(length if max_len is None else min(max_len, length)) // size)
    count = min(length // size + n_seq, n_seq * steps)
    bounds = cu_seqlens.long()
    start, end = bounds[:-1], bounds[1:]
    chunks = (end - start + size - 1) // size
    first = functional.pad(chunks.cumsum(0), (1, 0))
    # token -> slot
    sequence, position = token_map(cu_seqlens, length)
    slot = first[sequence] * size + position
    # slot -> token; a chunk beyond the last one belongs to no sequence and is given to the last, all pads
    number = torch.arange(count, device=x.device)
    owner = torch.searchsorted(first[1:], number, right=True).clamp(max=max(n_seq - 1, 0))
    k = number - first[owner]
    offset = (k * size).unsqueeze(1) + torch.arange(size, device=x.device)
    token = start[owner].unsqueeze(1) + offset
    last = end[owner].unsqueeze(1) - 1
    valid = token <= last
    token = torch.minimum(token, last).clamp(min=0).view(-1)
    # (step, sequence) -> chunk, for the pass over the states
    step = torch.arange(steps, device=x.device).unsqueeze(1)
    live = step < chunks
    chunk = (first[:-1] + step).clamp(max=max(count - 1, 0))
    turn = k.clamp(max=max(steps - 1, 0)) * n_seq + owner
    return Plan(size, n_seq, length, steps, count, token, valid, slot, chunk, live, turn)


def token_map(cu_seqlens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For each of n packed tokens: its sequence (n,) and its position within that sequence (n,), both int64."""
    bounds = cu_seqlens.long()
    index = torch.arange(n, device=cu_seqlens.device)
    sequence = torch.searchsorted(bounds[1:], index, right=True)
    return sequence, index - bounds[sequence]


def split(x: Tensor, plan: Plan) -> Tensor:
    """Cut x (S, T, ...) or (1, n, ...) into chunks (C, Q, ...); pads are 0."""
    if plan.token is not None:
        return _Split.apply(x.flatten(0, 1), plan.token, plan.valid, plan.slot)
    missing = plan.steps * plan.size - plan.length
    if missing:
        x = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.reshape(plan.count, plan.size, *x.shape[2:])


def join(y: Tensor, plan: Plan) -> Tensor:
    """Undo `split`: chunks (C, Q, ...) to (S, T, ...) or (1, n, ...); what stands in pads is dropped."""
    if plan.token is not None:
        return _Join.apply(y, plan.token, plan.valid, plan.slot).unsqueeze(0)
    y = y.reshape(plan.n_seq, plan.steps * plan.size, *y.shape[2:])
    return y[:, : plan.length]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype an op computes and keeps its states in: float64 for float64 input, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast on x's device is off."""
    if not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, has products of x computed; else x's."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _tail(mask: Tensor, like: Tensor) -> Tensor:
    """Give mask as many trailing dimensions of size 1 as `like` has more."""
    return mask.view(*mask.shape, *(1,) * (like.dim() - mask.dim()))


def _gather_chunks(x: Tensor, token: Tensor, valid: Tensor) -> Tensor:
    count, size = valid.shape
    y = x.index_select(0, token).view(count, size, *x.shape[1:])
    return y.masked_fill(~_tail(valid, y), 0)


def _gather_tokens(y: Tensor, slot: Tensor) -> Tensor:
    return y.flatten(0, 1).index_select(0, slot)


class _Split(torch.autograd.Function):
    """(n, ...) to (C, Q, ...), and back in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, valid: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(token, valid, slot)
        return _gather_chunks(x, token, valid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        token, valid, slot = ctx.saved_tensors
        return _Join.apply(grads[0], token, valid, slot), None, None, None


class _Join(torch.autograd.Function):
    """(C, Q, ...) to (n, ...), and back in the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, valid: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(token, valid, slot)
        return _gather_tokens(y, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        token, valid, slot = ctx.saved_tensors
        return _Split.apply(grads[0], token, valid, slot), None, None, None
