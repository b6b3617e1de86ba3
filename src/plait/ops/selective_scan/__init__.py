"""The selective scan of Mamba-1: a diagonal recurrence whose step, input and output weights depend on the token.

S sequences, T tokens, n packed tokens, E channels, N states a channel, G groups of channels that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_dims, check_packing, check_shape
from plait.ops.dispatch import Op, choose

SELECTIVE_SCAN = Op(
    "selective_scan",
    {
        "gpu": "plait.ops.selective_scan.gpu:selective_scan",
        "cpu": "plait.ops.selective_scan.cpu:selective_scan",
        "portable": "plait.ops.selective_scan.portable:selective_scan",
        "reference": "plait.ops.selective_scan.reference:selective_scan",
    },
    dict.fromkeys(("gpu", "cpu"), (torch.float32, torch.bfloat16, torch.float16)),
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t + D x_t (arXiv 2312.00752, eq. 2); y *= silu(z).

    x, dt, z (S, T, E); dt is used as softplus(dt + dt_bias), softplus only if `dt_softplus`; A (E, N) <= 0; B, C
    (S, T, N), or (S, T, G, N) and channel e uses group e // (E/G); D, dt_bias (E); initial_state (S, E, N), None
    for zeros. Packed: one row (1, n, ...) with cu_seqlens (S+1,) and max_len, a host bound of the lengths. Returns
    y like x and the state after each sequence's last token (S, E, N), float32 (float64 for float64 x). Raises
    ValueError for shapes that do not fit, BackendError for a backend that cannot run.
    """
    op = "selective_scan"
    check_dims(op, "x", x, "S, T, E")
    check_dims(op, "A", A, "E, N")
    n_seq = check_packing(op, x, cu_seqlens, max_len)
    rows, length, channels = x.shape
    states = A.shape[1]
    check_shape(op, "dt", dt, "S, T, E", rows, length, channels)
    check_shape(op, "A", A, "E, N", channels, states)
    for name, given in (("B", B), ("C", C)):
        if B.dim() == 4:
            check_shape(op, name, given, "S, T, G, N", rows, length, B.shape[2], states)
        else:
            check_shape(op, name, given, "S, T, N", rows, length, states)
    if B.dim() == 4 and (B.shape[2] < 1 or channels % B.shape[2]):
        raise ValueError(
            f"{op}: {B.shape[2]} groups of B and C, expected a divisor of the {channels} channels"
        )
    check_shape(op, "z", z, "S, T, E", rows, length, channels)
    check_shape(op, "D", D, "E", channels)
    check_shape(op, "dt_bias", dt_bias, "E", channels)
    check_shape(op, "initial_state", initial_state, "S, E, N", n_seq, channels, states)
    return choose(SELECTIVE_SCAN, backend, x.device, x.dtype)(
        x,
        dt,
        A,
        B,
        C,
        D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        max_len=max_len,
    )
