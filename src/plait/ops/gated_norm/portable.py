"""The gated RMS norm in plain torch, in blocks of rows that stay in a CPU's cache, with a hand-written backward.

Only the inputs and the scales are kept for the backward. With s = silu(z), r = 1 / rms(u) and the mean over a group:
    gate first:  u = x s, y = u r w;    g = dy w;    du = r (g - u r^2 mean(g u));  dx = du s,  ds = du x
    norm first:  u = x,   y = u r w s;  g = dy w s;  dx = r (g - u r^2 mean(g u));              ds = dy u r w
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.chunks import compute_dtype, no_autocast

BLOCK_ELEMENTS = 1 << 16
"""Elements of x that are worked on together on a CPU."""


def gated_norm(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x, z (..., E), weight (E) -> y (..., E) in ``dtype`` (x's); z None leaves the gate out, weight None: ones."""
    shape = (x.shape[:-1].numel(), x.shape[-1] // (group_size or x.shape[-1]), group_size or x.shape[-1])
    with no_autocast(x):
        y = _GatedNorm.apply(
            x.reshape(shape),
            None if z is None else z.reshape(shape),
            None if weight is None else weight.view(shape[1:]),
            eps,
            norm_before_gate,
            dtype or x.dtype,
        )
        return y.view(x.shape)


class _GatedNorm(torch.autograd.Function):
    """x (R, G, E/G), z alike or None, weight (G, E/G) or None, eps, norm_before_gate, dtype -> y; R rows, G groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        eps: float,
        norm_first: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        kind = compute_dtype(x)
        w = None if weight is None else weight.to(kind)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty((*x.shape[:2], 1), dtype=kind, device=x.device)
        for rows in _blocks(x):
            u, gate = x[rows].to(kind), None if z is None else functional.silu(z[rows].to(kind))
            if gate is not None and not norm_first:
                u = gate.mul_(u)
                gate = None
            scale = _inverse_rms(u, eps)
            scales[rows] = scale
            factors = [t for t in (scale, w, gate) if t is not None]
            for factor in factors[:-1]:
                u = u * factor
            y[rows] = u * factors[-1]
        ctx.save_for_backward(x, z, weight, scales)
        ctx.norm_first = norm_first
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, scales = ctx.saved_tensors
        kind = compute_dtype(x)
        w = None if weight is None else weight.to(kind)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dweight = torch.zeros(x.shape[1:], dtype=kind, device=x.device)
        with no_autocast(x):
            for rows in _blocks(x):
                own, dy, scale = x[rows].to(kind), grads[0][rows].to(kind), scales[rows]
                if z is None or dz is None:
                    dx[rows] = _norm_backward(own, dy, scale, w, dweight)
                    continue
                raw = z[rows].to(kind)
                gate = functional.silu(raw)
                if ctx.norm_first:
                    dgate = (own * dy).mul_(scale)
                    dx[rows] = _norm_backward(own, gate.mul_(dy), scale, w, dweight)
                    if w is not None:
                        dgate.mul_(w)
                else:
                    du = _norm_backward(own * gate, dy, scale, w, dweight)
                    dgate = own * du
                    dx[rows] = du.mul_(gate)
                dz[rows] = torch.ops.aten.silu_backward(dgate, raw)
        return dx, dz, None if weight is None else dweight.to(weight.dtype), None, None, None


def _inverse_rms(u: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(u^2) + eps) of every group: (R, G, K) -> (R, G, 1)."""
    return torch.linalg.vector_norm(u, dim=2, keepdim=True).square_().div_(u.shape[2]).add_(eps).rsqrt_()


def _norm_backward(u: Tensor, dn: Tensor, scale: Tensor, w: Tensor | None, dweight: Tensor) -> Tensor:
    """From the gradient dn of u * scale * w: that of u, a new tensor; that of w is added to `dweight`."""
    product = u * dn
    if w is None:
        g = dn * scale
    else:
        dweight.add_((product * scale).sum(0))
        product.mul_(w)
        g = (dn * w).mul_(scale)
    pull = product.sum(2, keepdim=True).mul_(scale.pow(3)).div_(-u.shape[2])
    return g.addcmul_(u, pull)


def _blocks(x: Tensor) -> list[slice]:
    """Runs of rows: cache-sized ones on a CPU; all rows at once elsewhere, or where a compiler fuses the passes."""
    rows = x.shape[0]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, rows)]
    size = max(BLOCK_ELEMENTS // (x.shape[1] * x.shape[2]), 1)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
