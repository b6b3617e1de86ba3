"""One token of Mamba-1's recurrence in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.chunks import compute_dtype, no_autocast


@torch.no_grad()
def selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_weight: Tensor | None = None,
) -> Tensor:
    """Shapes as in `plait.ops.selective_state_update`; the state is changed in place."""
    with no_autocast(x):
        kind = compute_dtype(x)
        given, step = x.to(kind), dt.to(kind)
        if dt_weight is not None:
            step = functional.linear(step, dt_weight.to(kind))
        if dt_bias is not None:
            step = step + dt_bias.to(kind)
        if dt_softplus:
            step = functional.softplus(step)
        state.mul_(torch.exp(step[..., None] * A.to(kind)))
        state.add_((step * given)[..., None] * B.to(kind)[:, None])
        y = torch.matmul(state.to(kind), C.to(kind)[..., None]).squeeze(-1)
        if D is not None:
            y = torch.addcmul(y, given, D.to(kind))
        if z is not None:
            y = y * functional.silu(z.to(kind))
        return y.to(x.dtype)
