"""The short causal convolution of Mamba: every channel with its own few taps, over time.

S sequences, T tokens, n packed tokens, C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_dims, check_packing, check_shape
from plait.ops.dispatch import Op, choose

CAUSAL_CONV1D = Op(
    "causal_conv1d",
    {
        "gpu": "plait.ops.causal_conv1d.gpu:causal_conv1d",
        "cpu": "plait.ops.causal_conv1d.cpu:causal_conv1d",
        "portable": "plait.ops.causal_conv1d.portable:causal_conv1d",
        "reference": "plait.ops.causal_conv1d.reference:causal_conv1d",
    },
    {"gpu": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)},
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight[:, j] x_{t-W+1+j}), act None or "silu"; weight[:, W-1] meets the current token.

    x (S, T, C); weight (C, W), W >= 1; bias (C); initial_state (S, W-1, C): the inputs before the first token, None
    for zeros. Packed: one row (1, n, C) with cu_seqlens (S+1,) and max_len, a host bound of the lengths. Returns y
    like x and each sequence's last W-1 inputs (S, W-1, C) in x's dtype. Raises ValueError for shapes or an
    activation that do not fit, BackendError for a backend that cannot run.
    """
    op = "causal_conv1d"
    check_dims(op, "x", x, "S, T, C")
    check_dims(op, "weight", weight, "C, W")
    n_seq = check_packing(op, x, cu_seqlens, max_len)
    channels, width = x.shape[2], weight.shape[1]
    check_shape(op, "weight", weight, "C, W", channels, max(width, 1))
    check_shape(op, "bias", bias, "C", channels)
    check_shape(op, "initial_state", initial_state, "S, W-1, C", n_seq, width - 1, channels)
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected None or 'silu'")
    return choose(CAUSAL_CONV1D, backend, x.device, x.dtype)(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        max_len=max_len,
    )
