"""One token of Mamba-2 between its projections, head by head: the truth the other backends are judged by.

[x, B, C] = silu(conv(xbc));  dt = clamp(softplus(dt + dt_bias));  S <- exp(dt A) S + dt x B^T;  u = (S C + D x) silu(z)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def ssd_update(
    z: Tensor | None,
    xbc: Tensor,
    dt: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    ngroups: int,
    dt_limit: tuple[float, float],
) -> Tensor:
    """Shapes as in `plait.ops.ssd_update`; both states are changed in place."""
    kind = torch.float64 if xbc.dtype == torch.float64 else torch.float32
    _, heads, width, states = ssm_state.shape
    mixed = xbc.to(kind)
    if conv_weight is not None and conv_state is not None:
        taps = conv_weight.to(kind)
        mixed = taps[:, -1] * xbc.to(kind)
        for j in range(conv_state.shape[1]):
            mixed = mixed + taps[:, j] * conv_state[:, j].to(kind)
        if conv_bias is not None:
            mixed = mixed + conv_bias.to(kind)
        mixed = functional.silu(mixed)
        for j in range(1, conv_state.shape[1]):
            conv_state[:, j - 1] = conv_state[:, j]
        if conv_state.shape[1]:
            conv_state[:, -1] = xbc
    keys = mixed[:, heads * width : heads * width + ngroups * states]
    queries = mixed[:, heads * width + ngroups * states :]
    outputs = []
    for h in range(heads):
        own, first = slice(h * width, (h + 1) * width), h // (heads // ngroups) * states
        x, B, C = mixed[:, own], keys[:, first : first + states], queries[:, first : first + states]
        step = dt[:, h].to(kind)
        if dt_bias is not None:
            step = step + dt_bias[h].to(kind)
        step = functional.softplus(step).clamp(*dt_limit)
        S = torch.exp(step * A[h].to(kind))[:, None, None] * ssm_state[:, h].to(kind)
        S = S + step[:, None, None] * x[:, :, None] * B[:, None, :]
        ssm_state[:, h] = S
        u = (S * C[:, None, :]).sum(2)
        if D is not None:
            u = u + D[h].to(kind) * x
        if z is not None:
            u = u * functional.silu(z[:, own].to(kind))
        outputs.append(u)
    return torch.cat(outputs, 1).to(xbc.dtype)
