"""A time-invariant diagonal state-space model in plain torch: matrix products over chunks of Q tokens.

The weights do not depend on the token, so all chunks share their matrices, one set a channel:
    y within a chunk    = L x,  L_ij = K_{i-j} for i >= j, lower triangular;  K_j = sum_n C_n B_n p_j
    state from a chunk  = sum_j p_{Q-1-j} B x_j;   y from the state that enters: y_i += sum_n C_n p_{i+1} h
with the powers p_j = exp(j dA), j = 0..Q. The state is passed over the chunks one by one. Source: S4D, arXiv
2206.11893, section 3; the chunks are our own.

Complex parameters are taken apart into real and imaginary parts, "pairs" of size 2 (size 1 if real): matrix products
are real, and only the pass over the chunks' states uses complex tensors, inside a function with its own gradient.
Powers are computed in float64 where the device has it: in float32 the angles j * Im(dA) would lose digits.

    S sequences, n = S*T tokens (packed: n), C chunks, Q tokens a chunk, E channels, N states a channel, M = N * pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.chunks import Plan, compute_dtype, join, no_autocast, plan_chunks, split
from plait.ops.selective_scan.carry import Route, carry_states, chunk_size, make_route

CHUNK = 32


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

    Packed: one row (1, n, E) with cu_seqlens (S+1,) and the host bound max_len.
    """
    with no_autocast(x):
        kind, length = compute_dtype(x), x.shape[1]
        n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (n_seq, *dA.shape, 2) if dA.is_complex() else (n_seq, *dA.shape)
        initial = x.new_zeros(shape, dtype=kind) if initial_state is None else initial_state.to(kind)
        if length == 0 or n_seq == 0:
            return torch.zeros_like(x), initial.clone()
        longest = length if cu_seqlens is None or max_len is None else max_len
        plan = plan_chunks(x, chunk_size(x, longest, CHUNK), cu_seqlens)
        xs = x.to(kind)
        powers = _powers(dA, plan.size, kind)
        weights = _Weights(powers, _pairs(B, kind), _pairs(C, kind))
        chunks = _turn(split(xs, plan).flatten(0, 1)).unflatten(1, (plan.count, plan.size))
        local = weights.chunk_end(chunks)
        start = initial if dA.is_complex() else initial.unsqueeze(-1)
        route = make_route(plan)
        decay = _scalars(powers[plan.size]).expand(plan.count, *dA.shape)
        entering, _ = carry_states(decay, _scalars(local), _scalars(start), route)
        entering = _as_pairs(entering)
        y = _turn(weights.outputs(chunks, entering).flatten(1)).unflatten(0, (plan.count, plan.size))
        y = join(y, plan)
        if D is not None:
            y = torch.addcmul(y, xs, D.to(kind))
        final = _final(xs.reshape(-1, xs.shape[2]), weights, entering, start, plan, route, cu_seqlens)
        return y.to(x.dtype), final if dA.is_complex() else final.squeeze(-1)


class _Weights:
    """The chunk matrices made of powers (Q+1, E, N, pair), B and C (E, N, pair)."""

    def __init__(self, powers: Tensor, B: Tensor, C: Tensor) -> None:
        self.size, self.channels, self.shape = powers.shape[0] - 1, powers.shape[1], powers.shape[2:]
        self.powers = powers
        # p_j B: what an input is worth in the state j tokens later, (Q, E, N, pair)
        self.reach = _times(powers[:-1], B)
        self.C = C

    def chunk_end(self, x: Tensor) -> Tensor:
        """The state a chunk reaches from zero: x (E, C, Q) -> (C, E, N, pair)."""
        matrix = self.reach.flip(0).transpose(0, 1).reshape(self.channels, self.size, -1)
        return _product(x, matrix).transpose(0, 1).unflatten(2, self.shape)

    def outputs(self, x: Tensor, entering: Tensor) -> Tensor:
        """y of all chunks: x (E, C, Q), entering (C, E, N, pair) -> (E, C, Q)."""
        kernel = (_reader(self.C) * self.reach).sum((2, 3)).t()
        # row j is K shifted right by j: column i holds K_{i-j}, and zeros before
        matrix = functional.pad(kernel, (self.size - 1, 0)).unfold(1, self.size, 1).flip(1)
        carried = _reader(_times(self.powers[1:], self.C)).flatten(2).permute(1, 2, 0)
        return _product(x, matrix) + _product(entering.flatten(2).transpose(0, 1), carried)


def _final(
    x: Tensor,
    weights: _Weights,
    entering: Tensor,
    initial: Tensor,
    plan: Plan,
    route: Route,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The state after each sequence's last token (S, E, N, pair), from the one that enters its last chunk.

    That chunk may hold fewer than Q tokens, so its tokens are gathered again, aligned to the right. x (n, E).
    """
    size = plan.size
    if cu_seqlens is None or route.ends is None:
        last = torch.arange(1, plan.n_seq + 1, device=x.device) * plan.steps - 1
        end = torch.arange(1, plan.n_seq + 1, device=x.device) * plan.length
        count = torch.full_like(end, plan.length - (plan.steps - 1) * size)
    else:
        end = cu_seqlens[1:].long()
        length = end - cu_seqlens[:-1].long()
        count = (length - 1) % size + 1
        count = torch.where(length > 0, count, 0)
        last = route.ends[1]
    step = torch.arange(size, device=x.device)
    index = (end - size).unsqueeze(1) + step
    own = step >= (size - count).unsqueeze(1)
    tokens = x.index_select(0, torch.where(own, index, 0).view(-1)).view(plan.n_seq, size, -1)
    tokens = torch.where(own.unsqueeze(2), tokens, 0).permute(2, 0, 1)
    decayed = _times(weights.powers.index_select(0, count), entering.index_select(0, last))
    final = decayed + weights.chunk_end(tokens)
    return torch.where((count > 0).view(-1, 1, 1, 1), final, initial)


class _Product(torch.autograd.Function):
    """Batched matrix product whose gradient, too, is computed without autocast."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        with no_autocast(a):
            return torch.bmm(grads[0], b.transpose(1, 2)), torch.bmm(a.transpose(1, 2), grads[0])


class _Turn(torch.autograd.Function):
    """The transposed matrix, contiguous; so is its gradient, because batched products are slow on other layouts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous().t().contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous().t().contiguous()


def _turn(x: Tensor) -> Tensor:
    """(I, J) to (J, I)."""
    return _Turn.apply(x)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(E, I, K) times (E, K, J)."""
    return _Product.apply(a, b)


def _powers(dA: Tensor, size: int, kind: torch.dtype) -> Tensor:
    """exp(j dA), j = 0..size, as pairs (size + 1, E, N, 2), or (size + 1, E, N, 1) if dA is real."""
    wide = kind if dA.device.type == "mps" else torch.float64
    step = torch.arange(size + 1, device=dA.device, dtype=wide).view(-1, 1, 1)
    if not dA.is_complex():
        return torch.exp(step * dA.to(wide)).to(kind).unsqueeze(-1)
    parts = torch.view_as_real(dA)
    log, angle = (step * part.to(wide) for part in parts.unbind(-1))
    size_of = torch.exp(log)
    return torch.stack([size_of * torch.cos(angle), size_of * torch.sin(angle)], -1).to(kind)


def _pairs(t: Tensor, kind: torch.dtype) -> Tensor:
    """(E, N) to (E, N, 2), or (E, N, 1) if real."""
    return (torch.view_as_real(t) if t.is_complex() else t.unsqueeze(-1)).to(kind)


def _reader(C: Tensor) -> Tensor:
    """The weights r with which sum_pair r h is C h, or 2 Re(C h) = 2 Re C Re h - 2 Im C Im h if complex."""
    return torch.stack([2 * C[..., 0], -2 * C[..., 1]], -1) if C.shape[-1] == 2 else C


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of two tensors of pairs."""
    if a.shape[-1] == 1:
        return a * b
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)


def _scalars(t: Tensor) -> Tensor:
    """Pairs (..., 2) to complex numbers, (..., 1) to real ones."""
    return torch.view_as_complex(t.contiguous()) if t.shape[-1] == 2 else t.squeeze(-1)


def _as_pairs(t: Tensor) -> Tensor:
    """Undo `_scalars`."""
    return torch.view_as_real(t) if t.is_complex() else t.unsqueeze(-1)
