"""Fake quantisation as BitNet b1.58 trains with it: ternary weights, and 8-bit activations token by token.

Both return what the quantised numbers stand for, in the dtype of their input, so that any matrix product can follow;
backwards the rounding counts as the identity (straight-through). Source: arXiv 2402.17764, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from plait.ops.dispatch import Op, choose

TERNARY_WEIGHT = Op(
    "ternary_weight",
    {
        "portable": "plait.ops.ternary.portable:ternary_weight",
        "reference": "plait.ops.ternary.reference:ternary_weight",
    },
)
INT8_ROWS = Op(
    "int8_rows",
    {
        "portable": "plait.ops.ternary.portable:int8_rows",
        "reference": "plait.ops.ternary.reference:int8_rows",
    },
)


def ternary_weight(
    weight: Tensor,
    parts: Sequence[int] | None = None,
    *,
    ste: Literal["identity", "clipped"] = "identity",
    backend: str | None = None,
) -> Tensor:
    """round(clamp(W / g, -1, 1)) g, with g = max(mean |W|, 1e-8) of each part and ties to even.

    weight (O, I); ``parts``: numbers of rows, summing to O, that share a scale (None: each row has its own).
    The gradient passes unchanged, or with ``ste="clipped"`` only where |W| <= g; none goes through g. Computed in
    float32 (float64 for a float64 weight). Raises ValueError for parts that do not fit.
    """
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(
            f"ternary_weight: weight has shape {tuple(weight.shape)}, expected (O, I) with I >= 1"
        )
    if parts is not None and (sum(parts) != weight.shape[0] or any(rows < 1 for rows in parts)):
        raise ValueError(
            f"ternary_weight: parts {list(parts)}, expected positive numbers of rows that sum to {weight.shape[0]}"
        )
    if ste not in ("identity", "clipped"):
        raise ValueError(f"ternary_weight: ste {ste!r}, expected 'identity' or 'clipped'")
    sizes = None if parts is None else tuple(parts)
    return choose(TERNARY_WEIGHT, backend, weight.device)(weight, sizes, clipped=ste == "clipped")


def int8_rows(x: Tensor, *, backend: str | None = None) -> Tensor:
    """clamp(round(x / s), -127, 127) s, with s = max(max |x| / 127, 1e-8) of each row of x (..., I).

    The gradient passes unchanged. Computed in float32 (float64 for float64 x).
    """
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"int8_rows: x has shape {tuple(x.shape)}, expected (..., I) with I >= 1")
    return choose(INT8_ROWS, backend, x.device)(x)
