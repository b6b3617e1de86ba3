"""Attention on NVIDIA GPUs: packed documents through torch's varlen_attn (FlashAttention), in bfloat16 and float16.

Nothing is read back from the device, and the traced form is the same call. Dense sequences need no kernel of their
own: torch's scaled_dot_product_attention has it. FlashAttention sums the gradient of q in any order unless
torch.use_deterministic_algorithms is on.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from plait.ops.attention import portable

WIDEST = 256
"""Channels a head that FlashAttention takes; it wants a multiple of STEP."""
STEP = 8
# torch 2.11 shares key heads without being told to, later ones want the word
_GQA: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """q (S, T, H, P), k and v (S, T, Hk, P), or packed (1, n, ...) with cu_seqlens -> (S, T, H, P).

    Dense sequences, dropout and heads wider than 256 run as in portable.py.
    """
    width = q.shape[3]
    if cu_seqlens is None or dropout or width > WIDEST or q.shape[1] == 0 or cu_seqlens.shape[0] < 2:
        return portable.attention(
            q,
            k,
            v,
            causal=causal,
            window=window,
            scale=scale,
            cu_seqlens=cu_seqlens,
            max_len=max_len,
            dropout=dropout,
        )
    # float32 comes here under autocast only
    kind = torch.get_autocast_dtype(q.device.type) if q.dtype == torch.float32 else q.dtype
    q, k, v = (t.flatten(0, 1).to(kind) for t in (q, k, v))
    missing = -width % STEP
    if missing:
        q, k, v = (F.pad(t, (0, missing)) for t in (q, k, v))
    bounds = cu_seqlens.int()
    longest = q.shape[0] if max_len is None else max_len
    reach = -1 if window is None else window - 1
    y = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        scale=width**-0.5 if scale is None else scale,
        window_size=(reach, 0 if causal else reach),
        **_GQA,
    )
    assert isinstance(y, Tensor)
    return y[..., :width].unsqueeze(0)
