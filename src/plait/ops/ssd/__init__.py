"""State space duality: the scalar-decay recurrences of Mamba-2 (`ssd`) and Mamba-3 (`trapezoidal_ssd`).

Both keep a state S_t (P, N) a head, decay it by one number a token, add outer products of values and keys, and read
it with a query. S sequences, T tokens, n packed tokens, H heads, P head width, G groups, N state size, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.ops.checks import check_dims, check_packing, check_shape
from plait.ops.dispatch import Op, choose

_LARGEST = {"gpu": 256}  # N: a program holds the state of a head's slice in registers
SSD = Op(
    "ssd",
    {
        "gpu": "plait.ops.ssd.gpu:ssd",
        "cpu": "plait.ops.ssd.cpu:ssd",
        "portable": "plait.ops.ssd.portable:ssd",
        "reference": "plait.ops.ssd.reference:ssd",
    },
    {
        "gpu": (torch.float32, torch.bfloat16, torch.float16),
        "cpu": (torch.float32, torch.bfloat16, torch.float16),
    },
    _LARGEST,
)
TRAPEZOIDAL_SSD = Op(
    "trapezoidal_ssd",
    {
        "gpu": "plait.ops.ssd.gpu_trapezoid:trapezoidal_ssd",
        "cpu": "plait.ops.ssd.cpu:trapezoidal_ssd",
        "portable": "plait.ops.ssd.portable:trapezoidal_ssd",
        "reference": "plait.ops.ssd.reference:trapezoidal_ssd",
    },
    dict.fromkeys(("gpu", "cpu"), (torch.float32, torch.bfloat16, torch.float16)),
    _LARGEST,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t (arXiv 2405.21060, eq. 1 and 6).

    x (S, T, H, P); dt (S, T, H), used as clamp(softplus(dt + dt_bias), *dt_limit), softplus only if `dt_softplus`;
    A (H) <= 0; B, C (S, T, G, N), head h uses group h // (H/G); D (H) or (H, P); dt_bias (H); initial_state
    (S, H, P, N), None for zeros. Packed: one row (1, n, ...) with cu_seqlens (S+1,) and max_len, a host bound of
    the lengths. Returns y like x and the state after each sequence's last token (S, H, P, N), float32 (float64 for
    float64 x). Raises ValueError for shapes that do not fit, BackendError for a backend that cannot run.
    """
    check_dims("ssd", "x", x, "S, T, H, P")
    check_dims("ssd", "B", B, "S, T, G, N")
    n_seq = check_packing("ssd", x, cu_seqlens, max_len)
    rows, length, heads, width = x.shape
    groups, state = B.shape[2:]
    _check_groups("ssd", heads, groups)
    check_shape("ssd", "dt", dt, "S, T, H", rows, length, heads)
    check_shape("ssd", "A", A, "H", heads)
    check_shape("ssd", "B", B, "S, T, G, N", rows, length, groups, state)
    check_shape("ssd", "C", C, "S, T, G, N", rows, length, groups, state)
    check_shape("ssd", "dt_bias", dt_bias, "H", heads)
    check_shape("ssd", "initial_state", initial_state, "S, H, P, N", n_seq, heads, width, state)
    if D is not None and D.dim() == 2:
        check_shape("ssd", "D", D, "H, P", heads, width)
    else:
        check_shape("ssd", "D", D, "H", heads)
    if not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"ssd: dt_limit is {dt_limit}, expected 0 <= low <= high")
    return choose(SSD, backend, x.device, x.dtype, state)(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        max_len=max_len,
    )


def trapezoidal_ssd(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    lam: Tensor,
    *,
    rank_in: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mamba-3's exponential-trapezoidal recurrence, of rank R (SISO: 1) (arXiv 2603.15569).

    With u_{t,r} = v_t rank_in_r:  S_t = exp(a_t) (S_{t-1} + dt_t (1 - lam_t) sum_r u_{t-1,r} k_{t-1,r}^T)
    + dt_t lam_t sum_r u_{t,r} k_{t,r}^T,  o_{t,r} = S_t q_{t,r} + D u_{t,r}.

    v (S, T, H, P); k, q (S, T, R, H, N), rotated; log_decay a <= 0, dt, lam in [0, 1] (S, T, H); rank_in (H, R, P),
    None for ones; D (H); initial_state (ssm (S, H, P, N), k (S, R, H, N), v (S, H, P)), None for zeros. Packed: one
    row (1, n, ...) with cu_seqlens (S+1,) and max_len, a host bound of the lengths. Returns o (S, T, R, H, P) in v's
    dtype and the state after each sequence's last token, float32 (float64 for float64 v). Raises ValueError for
    shapes that do not fit, BackendError for a backend that cannot run.
    """
    op = "trapezoidal_ssd"
    check_dims(op, "v", v, "S, T, H, P")
    check_dims(op, "k", k, "S, T, R, H, N")
    n_seq = check_packing(op, v, cu_seqlens, max_len)
    rows, length, heads, width = v.shape
    rank, state = k.shape[2], k.shape[4]
    check_shape(op, "k", k, "S, T, R, H, N", rows, length, rank, heads, state)
    check_shape(op, "q", q, "S, T, R, H, N", rows, length, rank, heads, state)
    for name, given in (("log_decay", log_decay), ("dt", dt), ("lam", lam)):
        check_shape(op, name, given, "S, T, H", rows, length, heads)
    check_shape(op, "rank_in", rank_in, "H, R, P", heads, rank, width)
    check_shape(op, "D", D, "H", heads)
    if initial_state is not None:
        ssm, last_k, last_v = initial_state
        check_shape(op, "initial_state[0]", ssm, "S, H, P, N", n_seq, heads, width, state)
        check_shape(op, "initial_state[1]", last_k, "S, R, H, N", n_seq, rank, heads, state)
        check_shape(op, "initial_state[2]", last_v, "S, H, P", n_seq, heads, width)
    return choose(TRAPEZOIDAL_SSD, backend, v.device, v.dtype, state)(
        v,
        k,
        q,
        log_decay,
        dt,
        lam,
        rank_in=rank_in,
        D=D,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        max_len=max_len,
    )


def _check_groups(op: str, heads: int, groups: int) -> None:
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: {groups} groups do not divide {heads} heads")
