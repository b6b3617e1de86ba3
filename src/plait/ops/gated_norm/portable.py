"""The gated RMS norm in plain torch, in blocks of rows that stay in a CPU's cache, with a hand-written backward.

Only the inputs are kept for the backward. With s = silu(z), n = u / rms(u) and m = the mean over the group:
    gate first:  u = x s, y = n w;      dn = dy w;    du = (dn - n m(dn n)) / rms(u);  dx = du s, ds = du x
    norm first:  u = x,   y = n w s;    dn = dy w s;  dx = (dn - n m(dn n)) / rms(u);  ds = dy n w
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
) -> Tensor:
    """x, z (..., E), weight (E) -> y (..., E) in x's dtype; z None leaves the gate out, weight None means ones."""
    channels = x.shape[-1]
    flat = None if z is None else z.reshape(-1, channels)
    with no_autocast(x):
        y = _GatedNorm.apply(
            x.reshape(-1, channels), flat, weight, eps, group_size or channels, norm_before_gate
        )
        return y.view(x.shape)


class _GatedNorm(torch.autograd.Function):
    """x (R, E), z (R, E) or None, weight (E) or None, eps, channels a group, norm_before_gate -> y (R, E)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, size: int, norm_first: bool
    ) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.options = (eps, size, norm_first)
        kind = compute_dtype(x)
        w = None if weight is None else weight.to(kind)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows in _blocks(x):
            gate = None if z is None else functional.silu(z[rows].to(kind))
            part = x[rows].to(kind)
            if gate is not None and not norm_first:
                part = part * gate
            part, _ = _normalise(part, eps, size)
            if w is not None:
                part.mul_(w)
            if gate is not None and norm_first:
                part.mul_(gate)
            y[rows] = part
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        eps, size, norm_first = ctx.options
        kind = compute_dtype(x)
        w = None if weight is None else weight.to(kind)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dweight = None if w is None else torch.zeros_like(w)
        with no_autocast(x):
            for rows in _blocks(x):
                own, dn = x[rows].to(kind), grads[0][rows].to(kind)
                raw = None if z is None else z[rows].to(kind)
                gate = None if raw is None else functional.silu(raw)
                n, scale = _normalise(own if gate is None or norm_first else own * gate, eps, size)
                dgate: Tensor | None = None
                if dweight is not None and w is not None:
                    product = dn * n
                    if norm_first and gate is not None:
                        dgate = product * w
                        product.mul_(gate)
                    dweight += product.sum(0)
                    dn = dn * w
                elif norm_first and gate is not None:
                    dgate = dn * n
                if norm_first and gate is not None:
                    dn = dn * gate
                du = _normalise_backward(dn, n, scale, size)
                if gate is None or raw is None or dz is None:
                    dx[rows] = du
                    continue
                if dgate is None:
                    dgate = du * own
                    du.mul_(gate)
                dx[rows] = du
                dz[rows] = torch.ops.aten.silu_backward(dgate, raw)
        return dx, dz, None if dweight is None else dweight.to(weight.dtype), None, None, None


def _normalise(u: Tensor, eps: float, size: int) -> tuple[Tensor, Tensor]:
    """u (R, E) -> u / rms (R, E), a new tensor, and 1 / rms of each group (R, E / size, 1)."""
    groups = u.unflatten(1, (-1, size))
    scale = (groups.square().sum(2, keepdim=True) / size + eps).rsqrt_()
    return (groups * scale).flatten(1), scale


def _normalise_backward(dn: Tensor, n: Tensor, scale: Tensor, size: int) -> Tensor:
    """The gradient of u, a new tensor: dn, n (R, E), scale (R, E / size, 1) -> (R, E)."""
    dn, n = dn.unflatten(1, (-1, size)), n.unflatten(1, (-1, size))
    mean = (dn * n).sum(2, keepdim=True).div_(-size)
    return torch.addcmul(dn, n, mean).mul_(scale).flatten(1)


def _blocks(x: Tensor) -> list[slice]:
    """Runs of rows: cache-sized ones on a CPU; all rows at once elsewhere, or where a compiler fuses the passes."""
    rows, channels = x.shape
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, rows)]
    size = max(BLOCK_ELEMENTS // channels, 1)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
