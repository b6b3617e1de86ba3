"""Ternary weights and 8-bit activations, part by part and row by row, with the straight-through trick written out."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8


def ternary_weight(weight: Tensor, parts: tuple[int, ...] | None, *, clipped: bool) -> Tensor:
    """weight (O, I) -> the same; ``parts`` rows share a scale, None: each row has its own."""
    with torch.autocast(weight.device.type, enabled=False):
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        done, row = [weight[:0]], 0
        for rows in (1,) * weight.shape[0] if parts is None else parts:
            part = weight[row : row + rows].to(kind)
            row += rows
            scale = part.detach().abs().mean().clamp(min=SMALLEST_SCALE)
            ratio = part / scale
            # what the gradient sees: the ratio, which clamp makes flat beyond 1
            seen = ratio.clamp(-1, 1) if clipped else ratio
            levels = ratio.clamp(-1, 1).round()
            done.append(((seen + (levels - seen).detach()) * scale).to(weight.dtype))
        return torch.cat(done)


def int8_rows(x: Tensor) -> Tensor:
    """x (..., I) -> the same."""
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = x.reshape(-1, x.shape[-1])
        done = [rows[:0]]
        for row in rows:
            exact = row.to(kind)
            scale = (exact.detach().abs().max() / 127).clamp(min=SMALLEST_SCALE)
            rounded = (exact / scale).round().clamp(-127, 127) * scale
            done.append((exact + (rounded - exact).detach()).to(x.dtype)[None])
        return torch.cat(done).view(x.shape)
