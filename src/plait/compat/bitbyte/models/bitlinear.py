"""BitByte's ternary linear map."""

from __future__ import annotations

from torch import nn

from plait.config.schema import LinearConfig
from plait.nn.ternary import TernaryLinear


def linear_config(act_quant: bool) -> LinearConfig:
    """Ternary with one scale a matrix; activations of 8 bits if ``act_quant``; gradients pass every rounding."""
    activations = "int8" if act_quant else "none"
    return LinearConfig.model_validate({"kind": "ternary", "activations": activations, "scale": "matrix"})


class BitLinear(TernaryLinear):
    """(..., in_features) -> (..., out_features) by weights of -1, 0 and 1 times their mean magnitude."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, act_quant: bool = True
    ) -> None:
        config = linear_config(act_quant)
        super().__init__(in_features, out_features, bias=bias, config=config, parts=[out_features])
        if self.bias is not None:
            nn.init.zeros_(self.bias)
