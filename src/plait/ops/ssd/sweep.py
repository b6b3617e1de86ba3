"""The pass over the states of the chunks, the engine's only loop along time.

Packed sequences are visited longest first, so that step k touches only as many as can have a chunk number k: at most
n // (k Q + 1) of them, a bound known without reading the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.chunks import Plan
from plait.ops.ssd.blocks import Maps, Sizes


def plan_visits(plan: Plan) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """The order of visits to packed sequences; nothing for a dense plan.

    Returns order (S,), the sequences, longest first; rank (S,), the place of each sequence in it; and chunk (K, S),
    chunk number k of sequence order[i], C where that sequence has no such chunk.
    """
    if plan.chunk is None or plan.live is None:
        return None, None, None
    order = torch.argsort(plan.live.sum(0), descending=True, stable=True)
    chunk = torch.where(plan.live, plan.chunk, plan.count).index_select(1, order)
    return order, torch.argsort(order), chunk


def sweep(
    local: Tensor, decay: Tensor, state: Tensor, sizes: Sizes, maps: Maps, *, reverse: bool = False
) -> Tensor:
    """Run S <- decay_c S + local_c over the chunks of every sequence, last chunk first if `reverse`.

    local (C+2, G, N, F P) is overwritten: entry c becomes the S that chunk c was given. decay (C, G, 1, F, 1);
    state (S, G, N, F P). Returns the last S of each sequence. Entry C of `local` is -0.0, which changes no number
    it is added to; entry C+1 takes what sequences without a k-th chunk write.
    """
    count, groups, _, heads, _ = decay.shape
    local = local.unflatten(3, (heads, -1))
    state = state.unflatten(3, (heads, -1))
    steps = range(sizes.steps - 1, -1, -1) if reverse else range(sizes.steps)
    if maps.order is None or maps.rank is None or maps.chunk is None:
        chunks = local[:count].unflatten(0, (sizes.n_seq, sizes.steps)).unbind(1)
        decays = decay.unflatten(0, (sizes.n_seq, sizes.steps)).unbind(1)
        for k in steps:
            new = torch.addcmul(chunks[k], decays[k], state)
            chunks[k].copy_(state)
            state = new
        return state.flatten(3)
    decay = torch.cat([decay, decay.new_ones(1, groups, 1, heads, 1)])
    state = state.index_select(0, maps.order)
    into = torch.where(maps.chunk == count, count + 1, maps.chunk)
    for k in steps:
        live = min(sizes.n_seq, sizes.length // (k * sizes.size + 1))
        old, index = state[:live], maps.chunk[k, :live]
        new = torch.addcmul(local.index_select(0, index), decay.index_select(0, index), old)
        local.index_copy_(0, into[k, :live], old)
        state = new if live == sizes.n_seq else torch.cat([new, state[live:]])
    return state.index_select(0, maps.rank).flatten(3)
