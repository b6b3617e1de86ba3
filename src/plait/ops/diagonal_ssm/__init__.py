"""A time-invariant diagonal state-space model (S4D): a recurrence whose weights are the same for every token.

S sequences, T tokens, n packed tokens, E channels, N states a channel (complex: N conjugate pairs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.checks import check_dims, check_packing, check_shape
from plait.ops.dispatch import Op, choose

DIAGONAL_SSM = Op(
    "diagonal_ssm",
    {
        "gpu": "plait.ops.diagonal_ssm.gpu:diagonal_ssm",
        "cpu": "plait.ops.diagonal_ssm.cpu:diagonal_ssm",
        "portable": "plait.ops.diagonal_ssm.portable:diagonal_ssm",
        "reference": "plait.ops.diagonal_ssm.reference:diagonal_ssm",
    },
    dict.fromkeys(("gpu", "cpu"), (torch.float32, torch.bfloat16, torch.float16)),
)


def diagonal_ssm(
    x: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dA) h_{t-1} + B x_t, y_t = sum_n C h_t + D x_t, or 2 Re(sum_n C h_t) + D x_t if complex.

    x (S, T, E) real; dA (E, N), the log decay of one step (step size times A, real part <= 0); B, C (E, N), complex
    if and only if dA is; D (E). The state is (S, E, N), or (S, E, N, 2) as real and imaginary parts; initial_state
    None is zeros. Packed: one row (1, n, E) with cu_seqlens (S+1,) and max_len, a host bound of the lengths.
    Returns y like x and the state after each sequence's last token, float32 (float64 for float64 x). Source: S4D,
    arXiv 2206.11893. Raises ValueError for shapes or kinds that do not fit, BackendError for a backend that cannot
    run.
    """
    op = "diagonal_ssm"
    check_dims(op, "x", x, "S, T, E")
    check_dims(op, "dA", dA, "E, N")
    n_seq = check_packing(op, x, cu_seqlens, max_len)
    channels, states = x.shape[2], dA.shape[1]
    if x.is_complex():
        raise ValueError(f"{op}: x has dtype {x.dtype}, expected a real one")
    for name, given in (("dA", dA), ("B", B), ("C", C)):
        check_shape(op, name, given, "E, N", channels, states)
        if given.is_complex() != dA.is_complex():
            raise ValueError(
                f"{op}: {name} has dtype {given.dtype} and dA {dA.dtype}, expected both real or both complex"
            )
    check_shape(op, "D", D, "E", channels)
    if dA.is_complex():
        check_shape(op, "initial_state", initial_state, "S, E, N, 2", n_seq, channels, states, 2)
    else:
        check_shape(op, "initial_state", initial_state, "S, E, N", n_seq, channels, states)
    return choose(DIAGONAL_SSM, backend, x.device, x.dtype)(
        x, dA, B, C, D, initial_state=initial_state, cu_seqlens=cu_seqlens, max_len=max_len
    )
