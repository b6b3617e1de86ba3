"""Small models and bytes of BitByte's, for the tests of its face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.compat.bitbyte.models import HybridLM

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bitbyte"
SMALL: dict[str, Any] = {"n_layer": 2, "d_model": 32, "d_ff": 48}
TEXT = b"the quick brown fox jumps over the lazy dog and sleeps under old trees. "


def hybrid(**more: Any) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(**SMALL, n_head=2, **more)


def adamw(model: nn.Module, lr: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def batches(count: int, length: int = 33) -> list[Tensor]:
    return [torch.randint(256, (2, length), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def plain_options(model: nn.Module) -> dict[str, Any]:
    """Updates as large as the gradient is: neither clipped nor normalised."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return {"optimizer": optimizer, "steps": 3, "log_every": 0, "grad_accum": 2, "grad_clip": None}
