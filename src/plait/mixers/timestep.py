"""The initial time steps of the Mamba family (arXiv 2312.00752, section 3.6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_softplus_dt(like: Tensor, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """softplus^-1(dt) with dt log-uniform in (dt_min, dt_max) and at least ``floor``; shaped like ``like``."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand_like(like) * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
