"""Smear: each token's embedding takes on a little of the one before it, as a cheap look at pairs of tokens.

    y_t = x_t + share * sigmoid(gate . x_t[:C]) * x_{t-1}

The first token of a sequence has nothing before it. It stands between the embedding and the first block, and obeys
the contract of a mixer; its state is the previous token's embedding. It has no place in the pattern.
Source: nanochat of July 2026 (github.com/karpathy/nanochat).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.mixers.contract import Layout, Mixer, State, state_dtype
from plait.nn.roles import VECTOR_FP32
from plait.ops.causal_conv1d import causal_conv1d


class Smear(Mixer):
    """(S, T, d) -> the same; ``channels`` C is how many channels of a token decide how much it takes."""

    roles: ClassVar = {"gate": VECTOR_FP32, "share": VECTOR_FP32}

    def __init__(self, d_model: int, channels: int) -> None:
        super().__init__(d_in=d_model, d_out=d_model)
        if channels > d_model:
            raise BuildError(
                f"embedding.smear_channels is {channels}, more than the {d_model} channels of the embedding"
            )
        self.gate = nn.Parameter(torch.empty(channels))
        self.share = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as the identity, with gates a little above their middle."""
        nn.init.uniform_(self.gate, 0.0, 0.02)
        nn.init.zeros_(self.share)

    def init_state(
        self,
        n_seq: int,
        capacity: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """last (S, 1, d) in ``dtype``, zero: a token that adds nothing."""
        return State(last=torch.zeros(n_seq, 1, self.d_in, device=device, dtype=dtype))

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract."""
        # A convolution with the taps (1, 0) is the token before, of the same sequence or from its state.
        taps = (torch.arange(2, device=x.device) == 0).to(x.dtype).expand(self.d_in, 2)
        before, last = causal_conv1d(
            x,
            taps,
            initial_state=None if state is None else state["last"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        seen = x[..., : self.gate.shape[0]].to(state_dtype(x.dtype))
        gate = self.share * torch.sigmoid((seen * self.gate).sum(-1, keepdim=True))
        y = x + gate.to(x.dtype) * before
        return y, None if state is None else State(last=last.to(state["last"].dtype))

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """The gate, and what it adds."""
        return n_new * 2 * (self.gate.shape[0] + self.d_in)
