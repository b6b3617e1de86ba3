"""What this machine can do at most, measured now: the floors under the times of the ops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from plait.bench.timing import measure


@dataclass(frozen=True)
class Ceilings:
    """Bytes, floating-point operations and exponentials a second."""

    bytes: float
    flops: float
    exponentials: float

    def floor(self, n_bytes: float, flops: float = 0.0, exponentials: float = 0.0) -> tuple[float, str]:
        """(milliseconds, which bound: bytes, flops or exp) that the work takes at least."""
        bounds = {
            "bytes": n_bytes / self.bytes,
            "flops": flops / self.flops,
            "exp": exponentials / self.exponentials,
        }
        name = max(bounds, key=bounds.__getitem__)
        return 1000 * bounds[name], name


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A copy larger than the caches and a square matrix product, timed; exponentials follow from the processor.

    A CPU computes one as a polynomial, about seven multiply-adds; a GPU has special units for them.
    """
    gpu = device.type == "cuda"
    source = torch.randn((1 << 28) if gpu else (1 << 25), device=device)
    target = torch.empty_like(source)
    width = 8192 if gpu else 1024
    a = torch.randn(width, width, device=device, dtype=dtype)
    copied = measure(lambda: target.copy_(source), device, seconds=0.5).median
    product = measure(lambda: a @ a, device, seconds=0.5).median
    single = torch.randn(width, width, device=device)
    flops32 = (
        product if dtype == torch.float32 else measure(lambda: single @ single, device, seconds=0.5).median
    )
    return Ceilings(
        bytes=2 * source.numel() * 4 / copied * 1000,
        flops=2 * width**3 / product * 1000,
        exponentials=_special_units(device) if gpu else 2 * width**3 / flops32 * 1000 / 14,
    )


def _special_units(device: torch.device) -> float:
    gpu = torch.cuda.get_device_properties(device)
    clock = getattr(gpu, "clock_rate", None)  # kHz; older releases of torch do not tell it
    return math.inf if clock is None else 16e3 * gpu.multi_processor_count * float(clock)
