"""Shape checks of the public op functions: one line that says what was given and what is expected.

They read shapes and dtypes only, never numbers, so they cost nothing on a device and torch.compile traces them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(op: str, name: str, given: Tensor | None, letters: str, *sizes: int) -> None:
    """Raise ValueError unless `given` (None passes) has exactly these sizes; `letters` names them, as "S, T, H"."""
    if given is None:
        return
    if given.dim() != len(sizes) or any(a != b for a, b in zip(given.shape, sizes, strict=True)):
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}, expected ({letters}) = {sizes}")


def check_dims(op: str, name: str, given: Tensor, letters: str) -> None:
    """Raise ValueError unless `given` has as many dimensions as `letters`, as in "S, T, H, P", names."""
    if given.dim() != letters.count(",") + 1:
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}, expected ({letters})")


def check_contiguous(op: str, name: str, given: Tensor) -> None:
    """Raise ValueError unless `given`, which is changed in place, lies in memory without gaps and in order."""
    if not given.is_contiguous():
        raise ValueError(
            f"{op}: {name} has strides {given.stride()}, but is changed in place: give a contiguous tensor"
        )


def check_no_gradient(op: str, *given: Tensor | None) -> None:
    """Raise ValueError where autograd would expect a gradient of an op that has none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        raise ValueError(f"{op}: it has no gradient, it is for decoding: call it under torch.no_grad()")


def check_packing(op: str, x: Tensor, cu_seqlens: Tensor | None, max_len: int | None) -> int:
    """Check cu_seqlens (S+1,) and max_len against x (S, T, ...) or (1, n, ...); return S.

    What cu_seqlens holds is not read: it begins with 0, never falls and ends with n; max_len bounds the lengths.
    """
    if cu_seqlens is None:
        return x.shape[0]
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}, "
            "expected (S+1,) of int32 or int64"
        )
    if x.shape[0] != 1:
        raise ValueError(f"{op}: with cu_seqlens the input has one row, (1, n, ...); given {tuple(x.shape)}")
    if max_len is not None and max_len < 0:
        raise ValueError(f"{op}: max_len is {max_len}, expected an upper bound of the lengths (0 or more)")
    return cu_seqlens.shape[0] - 1
