"""A linear map with ternary weights (BitLinear, arXiv 2402.17764): full weights are trained, -1, 0, 1 compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.config.schema import LinearConfig
from plait.nn.norm import RMSNorm
from plait.ops.chunks import compute_dtype, no_autocast
from plait.ops.ternary import int8_rows, ternary_weight


class TernaryLinear(nn.Linear):
    """(..., d_in) -> (..., d_out); its parameters, roles and initial weights are those of any linear map.

    ``parts`` are the outputs of the matrices joined in it. Computed in float32 whatever autocast says, because the
    levels of the inputs are worth little in a lower precision; the output has the dtype of a dense map's.
    """

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool, config: LinearConfig, parts: Sequence[int]
    ) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.config = config
        scaled: dict[str, tuple[int, ...] | None] = {"part": tuple(parts), "matrix": (d_out,), "row": None}
        self.parts = scaled[config.scale]
        self.norm = RMSNorm(d_in) if config.norm else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in)."""
        device = x.device.type
        lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if lowered else x.dtype
        with no_autocast(x):
            wide = compute_dtype(x)
            h = x.to(wide)
            if self.norm is not None:
                h = self.norm(h)
            if self.config.activations == "int8":
                h = int8_rows(h)
            weight = ternary_weight(self.weight.to(wide), self.parts, ste=self.config.ste)
            y = F.linear(h, weight, None if self.bias is None else self.bias.to(wide))
        return y.to(dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        c = self.config
        return f"{super().extra_repr()}, ternary, activations={c.activations}, scale={c.scale}, ste={c.ste}"
