"""Rotary position embedding (RoPE, arXiv 2104.09864): full or partial, half-split or interleaved pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first 2R channels of x (..., P) by R angles given as cos, sin (..., R); the rest stays.

    Pair i is (2i, 2i+1) if interleaved, else (i, R + i); (a, b) -> (a cos - b sin, a sin + b cos).
    """
    n_angles = cos.shape[-1]
    turned, rest = x[..., : 2 * n_angles], x[..., 2 * n_angles :]
    if interleaved:
        a, b = turned.unflatten(-1, (n_angles, 2)).unbind(-1)
        out = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        out = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


def rope_tables(positions: Tensor, n_angles: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, R) of ``positions`` (...) times the R frequencies base^(-i/R), in float32."""
    # in the order in which everybody else rounds: tables rounded further to bfloat16 are then equal, too
    exponent = torch.arange(0, 2 * n_angles, 2, device=positions.device, dtype=torch.float32) / (2 * n_angles)
    angle = positions[..., None].float() * (1.0 / base**exponent)
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def apply_rope(
    x: Tensor,
    positions: Tensor,
    *,
    base: float,
    n_angles: int,
    interleaved: bool = False,
    reverse: bool = False,
    tables: torch.dtype = torch.float32,
) -> Tensor:
    """Rotate x (..., T, H, P) by the positions (..., T) of its tokens; computed in float32, returned in x's dtype.

    ``reverse``: by minus the angles. ``tables``: cos and sin are rounded to this dtype before they are used.
    """
    cos, sin = rope_tables(positions, n_angles, base)
    cos, sin = cos.to(tables), sin.to(tables)
    if reverse:
        sin = -sin
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return rotate_pairs(x.to(wide), cos.to(wide), sin.to(wide), interleaved=interleaved).to(x.dtype)
