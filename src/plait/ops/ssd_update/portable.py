"""One token of Mamba-2 between its projections in plain torch, all heads at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plait.ops.causal_conv1d_update.portable import convolve
from plait.ops.chunks import compute_dtype, no_autocast


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
    with no_autocast(xbc):
        kind = compute_dtype(xbc)
        _, heads, width, states = ssm_state.shape
        mixed = xbc.to(kind)
        if conv_state is not None and conv_weight is not None:
            mixed = convolve(xbc, conv_state, conv_weight, conv_bias, "silu")
        x, B, C = mixed.split([heads * width, ngroups * states, ngroups * states], 1)
        x = x.unflatten(1, (heads, width))
        step = dt.to(kind)
        if dt_bias is not None:
            step = step + dt_bias.to(kind)
        step = functional.softplus(step).clamp(*dt_limit)
        # heads of a group side by side: B and C are the group's
        S = ssm_state.view(-1, ngroups, heads // ngroups, width, states)
        S.mul_(torch.exp(step * A.to(kind)).view(-1, ngroups, heads // ngroups, 1, 1))
        new = (step[..., None] * x).view(-1, ngroups, heads // ngroups, width, 1)
        S.add_(new * B.reshape(-1, ngroups, 1, 1, states))
        u = torch.matmul(S.to(kind), C.reshape(-1, ngroups, 1, states, 1)).view(x.shape)
        if D is not None:
            u = torch.addcmul(u, x, D.to(kind) if D.dim() == 2 else D.to(kind)[:, None])
        u = u.flatten(1)
        if z is not None:
            u = u * functional.silu(z.to(kind))
        return u.to(xbc.dtype)
