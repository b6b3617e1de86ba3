"""Mamba-1's selective scan in plain torch, all chunks at once, with a hand-written backward.

The state is diagonal, so it has no matrix form; chunks of Q tokens advance in parallel instead, token j of every
chunk in one operation. Three passes: the state each chunk reaches from zero; the pass over chunk states (a chunk's
decay is exp(A * sum of dt)); the replay from the right states, which gives y. The backward keeps the states that
enter the chunks, runs the same three passes in reverse for the adjoint g of the state, and recomputes a block of
chunks at a time, so that (T, E, N) never exists.

    C chunks, Q tokens a chunk, G groups of B and C, K = E / G channels a group, N states a channel.
    h_t = a_t h_{t-1} + u_t B_t,  a_t = exp(dt_t A),  u_t = dt_t x_t,  y_t = C_t h_t        (arXiv 2312.00752, eq. 2)
    g_t = C_t dy_t + a_{t+1} g_{t+1};  w_t = a_t h_{t-1};  dx = dt B.g;  d(dt) = x B.g + A.(g w);  dA = sum dt g w
States are (chunk, G, N, K): channels last, so that every operation runs along contiguous channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.chunks import compute_dtype, join, no_autocast, plan_chunks, split
from plait.ops.selective_scan.carry import Route, chunk_size, make_route, run_backward, run_forward

CHUNK, LONG_CHUNK, LONG = 16, 32, 1024
"""Tokens a chunk, up to LONG tokens a sequence and beyond: short chunks waste less on pads and have fewer serial
steps, long ones halve the kept states and the pass over them."""
BLOCK_ELEMENTS = {"cpu": 1 << 17}
"""State elements that advance together: on a CPU what stays in the second-level cache; elsewhere 2^22."""
MAX_BLOCKS = 16
"""Bounds the number of operations; the states recomputed at a time are then T * E * N / 16 at most (or a block)."""
MAX_COMPILED_BLOCKS = 4
"""The same bound for a graph, whose compilation takes time for every operation."""


class Inputs(NamedTuple):
    """The chunked operands of a scan: x, dt (C, Q, G, K), A (G, N, K), B, C (C, Q, G, N)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x, dt, z (S, T, E), A (E, N), B, C (S, T, N) or (S, T, G, N) -> y (S, T, E), final state (S, E, N).

    Packed: one row (1, n, ...) with cu_seqlens (S+1,) and the host bound max_len.
    """
    with no_autocast(x):
        kind = compute_dtype(x)
        (channels, states), groups = A.shape, 1 if B.dim() == 3 else B.shape[2]
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if initial_state is None:
            initial_state = x.new_zeros(count, channels, states, dtype=kind)
        initial = initial_state.to(kind)
        if x.shape[1] == 0 or count == 0:
            return torch.zeros_like(x), initial.clone()
        xs, delta = x.to(kind), dt.to(kind)
        if dt_bias is not None:
            delta = delta + dt_bias.to(kind)
        if dt_softplus:
            delta = functional.softplus(delta)
        longest = x.shape[1] if cu_seqlens is None or max_len is None else max_len
        plan = plan_chunks(x, chunk_size(x, longest, CHUNK if longest <= LONG else LONG_CHUNK), cu_seqlens)
        shape = (groups, channels // groups)
        # a pad has dt = 0 and x = 0: it neither decays the state nor adds to it
        y, final = _Scan.apply(
            split(xs, plan).unflatten(-1, shape),
            split(delta, plan).unflatten(-1, shape),
            A.to(kind).unflatten(0, shape).transpose(1, 2).contiguous(),
            split(B.to(kind).view(*x.shape[:2], groups, states), plan),
            split(C.to(kind).view(*x.shape[:2], groups, states), plan),
            initial.unflatten(1, shape).transpose(2, 3).contiguous(),
            *make_route(plan),
        )
        y = join(y.flatten(-2), plan)
        if D is not None:
            y = torch.addcmul(y, xs, D.to(kind))
        if z is not None:
            y = y * functional.silu(z.to(kind))
        return y.to(x.dtype), final.transpose(2, 3).reshape(count, channels, states)


class _Scan(torch.autograd.Function):
    """(x, dt, A, B, C, initial (S, G, N, K), *route) -> y (C, Q, G, K), final (S, G, N, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial: Tensor,
        first: Tensor | None,
        owner: Tensor | None,
        ends: Tensor | None,
        filled: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(x, dt, A, B, C)
        blocks = _blocks(inputs)
        y = torch.empty_like(x)
        if first is None and x.shape[0] == initial.shape[0]:
            # one chunk a sequence (a decoding step, say): nothing to pass on
            entering, final = initial, torch.empty_like(initial)
            for b in blocks:
                _replay(_take(inputs, b), initial[b], y[b], final[b])
        else:
            local = x.new_empty(x.shape[0], *A.shape)
            for b in blocks:
                _chunk_ends(_take(inputs, b), local[b])
            route = Route(first, owner, ends, filled)
            entering, final = run_forward(
                _decay(dt.sum(1), A, torch.empty_like(local)), local, initial, route
            )
            for b in blocks:
                _replay(_take(inputs, b), entering[b], y[b], local[b])
        ctx.save_for_backward(x, dt, A, B, C, entering, first, owner, ends, filled)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, entering, *route = ctx.saved_tensors
        with no_autocast(x):
            inputs, (dy, final) = Inputs(x, dt, A, B, C), grads
            blocks = _blocks(inputs)
            own = torch.empty_like(entering)
            for b in blocks:
                _adjoint_starts(_take(inputs, b), dy[b], own[b])
            leaving, initial = run_backward(
                _decay(dt.sum(1), A, torch.empty_like(own)), own, final, Route(*route)
            )
            dx, ddt, dA, dB, dC = (torch.zeros_like(t) for t in inputs)
            gradients = Inputs(dx, ddt, dA, dB, dC)
            scratch = [torch.empty_like(entering[blocks[0]]) for _ in range(x.shape[1] + 2)]
            for b in blocks:
                _differentiate(_take(inputs, b), dy[b], entering[b], leaving[b], _take(gradients, b), scratch)
            return dx, ddt, dA, dB, dC, initial, None, None, None, None


def _blocks(inputs: Inputs) -> list[slice]:
    """Cut the chunks into at most MAX_BLOCKS runs whose states are of a size that suits the device."""
    chunks = inputs.x.shape[0]
    wanted = BLOCK_ELEMENTS.get(inputs.x.device.type, 1 << 22)
    most = MAX_COMPILED_BLOCKS if torch.compiler.is_compiling() else MAX_BLOCKS
    count = min(-(-chunks * inputs.A.numel() // wanted), most, chunks)
    size = -(-chunks // count)
    return [slice(i, min(i + size, chunks)) for i in range(0, chunks, size)]


def _take(inputs: Inputs, block: slice) -> Inputs:
    return Inputs(inputs.x[block], inputs.dt[block], inputs.A, inputs.B[block], inputs.C[block])


def _decay(dt: Tensor, A: Tensor, out: Tensor) -> Tensor:
    """exp(dt A), written to `out`: dt (C, G, K), A (G, N, K) -> (C, G, N, K)."""
    return torch.mul(dt.unsqueeze(2), A, out=out).exp_()


def _chunk_ends(inputs: Inputs, h: Tensor) -> None:
    """Write the state that each chunk reaches from zero to h (C, G, N, K)."""
    x, dt, A, B, _ = inputs
    h.zero_()
    decay = torch.empty_like(h)
    for dt_t, u_t, B_t in zip(
        dt.unbind(1), (dt * x).unsqueeze(3).unbind(1), B.unsqueeze(-1).unbind(1), strict=True
    ):
        h.mul_(_decay(dt_t, A, decay)).addcmul_(u_t, B_t)


def _replay(inputs: Inputs, entering: Tensor, y: Tensor, h: Tensor) -> None:
    """Run every chunk from the state that enters it: write y (C, Q, G, K), and the states that leave to h."""
    x, dt, A, B, C = inputs
    u = (dt * x).unsqueeze(3).unbind(1)
    h.copy_(entering)
    decay = torch.empty_like(h)
    for dt_t, u_t, B_t, C_t, y_t in zip(
        dt.unbind(1), u, B.unsqueeze(-1).unbind(1), C.unbind(1), y.unbind(1), strict=True
    ):
        h.mul_(_decay(dt_t, A, decay)).addcmul_(u_t, B_t)
        y_t.copy_(_over_states(C_t, h))


def _adjoint_starts(inputs: Inputs, dy: Tensor, g: Tensor) -> None:
    """Write the gradient of each chunk's own outputs with respect to the state that enters it (C, G, N, K)."""
    _, dt, A, _, C = inputs
    g.zero_()
    decay = torch.empty_like(g)
    steps = list(zip(dt.unbind(1), dy.unsqueeze(3).unbind(1), C.unsqueeze(-1).unbind(1), strict=True))
    for dt_t, dy_t, C_t in reversed(steps):
        g.addcmul_(C_t, dy_t).mul_(_decay(dt_t, A, decay))


def _differentiate(
    inputs: Inputs, dy: Tensor, entering: Tensor, leaving: Tensor, out: Inputs, scratch: list[Tensor]
) -> None:
    """Write the gradients of a block of chunks to `out`; that of A is added.

    `entering` are the states at the chunks' begins, `leaving` the gradients of the states at their ends. `scratch`
    are Q + 2 tensors of the states' shape (the last block may be shorter).
    """
    x, dt, A, B, C = inputs
    h, product, *kept = [t[: x.shape[0]] for t in scratch]
    h.copy_(entering)
    u = dt * x
    forth = zip(dt.unbind(1), u.unbind(1), B.unbind(1), dy.unbind(1), out.C.unbind(1), kept, strict=True)
    for dt_t, u_t, B_t, dy_t, dC_t, w in forth:
        torch.mul(_decay(dt_t, A, product), h, out=w)
        torch.addcmul(w, u_t.unsqueeze(2), B_t.unsqueeze(3), out=h)
        dC_t.copy_(torch.mul(h, dy_t.unsqueeze(2), out=product).sum(3))
    g, dA = leaving.clone(), torch.zeros_like(leaving)
    gB, gA = torch.empty_like(x), torch.empty_like(x)
    back = list(zip(*(t.unbind(1) for t in (dt, u, B, C, dy, out.B, gB, gA)), kept, strict=True))
    for dt_t, u_t, B_t, C_t, dy_t, dB_t, gB_t, gA_t, w in reversed(back):
        g.addcmul_(C_t.unsqueeze(3), dy_t.unsqueeze(2))
        gB_t.copy_(_over_states(B_t, g))
        dB_t.copy_(torch.mul(g, u_t.unsqueeze(2), out=product).sum(3))
        w.mul_(g)
        dA.addcmul_(w, dt_t.unsqueeze(2))
        gA_t.copy_(w.mul_(A).sum(2))
        g.mul_(_decay(dt_t, A, product))
    out.A.add_(dA.sum(0))
    out.x.copy_(dt * gB)
    out.dt.copy_(gA.addcmul_(x, gB))


def _over_states(v: Tensor, h: Tensor) -> Tensor:
    """sum_n v[c,g,n] h[c,g,n,k]: (C, G, N), (C, G, N, K) -> (C, G, K)."""
    return torch.bmm(v.flatten(0, 1).unsqueeze(1), h.flatten(0, 1)).view(*h.shape[:2], h.shape[3])
