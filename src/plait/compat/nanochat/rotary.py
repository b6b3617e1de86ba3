"""The rotary tables as nanochat holds them, (1, T, 1, head width / 2) in bfloat16, and its way to use them."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.config.errors import BuildError
from plait.nn.rope import rope_tables, rotate_pairs

BASE = 10000.0


def rotary_tables(
    length: int, headdim: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the positions 0 .. length - 1, each (1, length, 1, headdim / 2) in bfloat16."""
    cos, sin = rope_tables(torch.arange(length, device=device), headdim // 2, BASE)
    return cos[None].to(torch.bfloat16), sin[None].to(torch.bfloat16)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, P) by minus the angles whose cos and sin are (1, T, 1, P/2); in x's dtype."""
    if x.dim() != 4:
        raise BuildError(f"apply_rotary_emb takes (B, T, heads, width); got {tuple(x.shape)}")
    return rotate_pairs(x, cos.to(x.dtype), -sin.to(x.dtype))


def check_tables(cos_sin: tuple[Tensor, Tensor], length: int, headdim: int) -> None:
    """BuildError unless these are the tables of the positions 0 .. length - 1, by which a block rotates anyway."""
    cos, sin = cos_sin
    if cos.device.type == "meta":
        return
    for given, ours in zip((cos, sin), rotary_tables(length, headdim, cos.device), strict=True):
        if given.shape != ours.shape or not torch.allclose(given.float(), ours.float(), atol=1e-2):
            raise BuildError(
                f"cos_sin are not the tables of the {length} positions of x from 0 on: they must be (1, {length}, 1, "
                f"{headdim // 2}), of base {BASE:g}; leave them out, the block has its own"
            )
