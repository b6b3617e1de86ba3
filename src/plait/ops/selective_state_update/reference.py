"""One token of Mamba-1's recurrence, state after state: the truth the other backends are judged by.

h_n <- exp(dt A_n) h_n + dt x B_n;   y = (sum_n h_n C_n + D x) z sigmoid(z)
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    given = x.to(kind)
    step = dt.to(kind)
    if dt_weight is not None:
        step = torch.stack([(dt_weight.to(kind) * row).sum(1) for row in step]) if len(step) else given
    if dt_bias is not None:
        step = step + dt_bias.to(kind)
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    y = torch.zeros_like(given) if D is None else D.to(kind) * given
    for n in range(A.shape[1]):
        decay = torch.exp(step * A[:, n].to(kind))
        h = decay * state[:, :, n].to(kind) + step * given * B[:, n, None].to(kind)
        state[:, :, n] = h
        y = y + h * C[:, n, None].to(kind)
    if z is not None:
        gate = z.to(kind)
        y = y * gate / (1 + torch.exp(-gate))
    return y.to(x.dtype)
