"""What Plait's ops are compared with: the usual fallbacks in plain torch, and other packages if they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.config.errors import BackendError

Outputs = tuple[Tensor, ...]
Peer = Callable[..., Outputs]

LONGEST_LOOP = 1024
"""Tokens: a loop over more takes seconds, and its ratio is the same."""


def scan_loop(device: torch.device) -> Peer | None:
    """The selective scan as it is usually written without a kernel: all decays at once, then a loop over time."""
    return _loop if device.type == "cpu" else None


def _loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Outputs:
    if x.shape[1] > LONGEST_LOOP:
        raise BackendError(f"the loop is timed up to {LONGEST_LOOP} tokens")
    dt = F.softplus(dt + dt_bias)
    decays = torch.exp(torch.einsum("bld,dn->bldn", dt, A))
    writes = torch.einsum("bld,bln->bldn", dt * x, B)
    h = torch.zeros_like(decays[:, 0])
    ys = []
    # unbind: indexing in the loop would make backward quadratic
    for decay, write, c in zip(decays.unbind(1), writes.unbind(1), C.unbind(1), strict=True):
        h = decay * h + write
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return ((torch.stack(ys, 1) + D * x) * F.silu(z),)


def ssd_chunked(device: torch.device) -> Peer | None:
    """Mamba-2's recurrence in chunks of 128, as matrix products in plain torch (arXiv 2405.21060, listing 1)."""
    return _chunked if device.type == "cpu" else None


def _chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk: int = 128
) -> Outputs:
    length = x.shape[1]
    pad = -length % chunk
    dt = F.softplus(dt + dt_bias)
    skip = D[:, None] * x
    if pad:
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    scaled, B, C = (t.unflatten(1, (-1, chunk)) for t in (x * dt[..., None], B.squeeze(2), C.squeeze(2)))
    log = (dt * A).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)  # (b, h, c, q)
    sums = log.cumsum(-1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    within = (sums[..., :, None] - sums[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    y = torch.einsum("bcqn,bckn,bhcqk,bckhp->bcqhp", C, B, within, scaled)
    states = torch.einsum("bckn,bhck,bckhp->bchpn", B, (sums[..., -1:] - sums).exp(), scaled)
    carried = [torch.zeros_like(states[:, 0])]
    for state, decay in zip(states.unbind(1), sums[..., -1].exp().unbind(2), strict=True):
        carried.append(decay[:, :, None, None] * carried[-1] + state)
    before = torch.stack(carried[:-1], 1)
    y = y + torch.einsum("bcqn,bchpn,bhcq->bcqhp", C, before, sums.exp())
    return (y.flatten(1, 2)[:, :length] + skip,)


def state_spaces(name: str) -> Callable[[torch.device], Peer | None]:
    """The op of that name of the package mamba_ssm, on a GPU where it is installed."""

    def find(device: torch.device) -> Peer | None:
        if device.type != "cuda" or find_spec("mamba_ssm") is None:
            return None
        return _mamba_ssm_scan() if name == "selective_scan" else _mamba_ssm_ssd()

    return find


def _mamba_ssm_scan() -> Peer:
    function = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def call(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
    ) -> Outputs:
        time_last = (t.transpose(1, 2).contiguous() for t in (x, dt))
        keys = (t.transpose(1, 2).contiguous() for t in (B, C))
        y = function(*time_last, A, *keys, D, z.transpose(1, 2).contiguous(), dt_bias, delta_softplus=True)
        return (y.transpose(1, 2),)

    return call


def _mamba_ssm_ssd() -> Peer:
    function: Any = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Outputs:
        return (function(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True),)

    return call
