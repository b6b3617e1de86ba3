"""BitByte's mixer: Plait's Mamba with ternary maps, among them those to time steps, B and C."""

from __future__ import annotations

from typing import Any, Self

from plait.compat.bitbyte.models.bitlinear import linear_config
from plait.mixers.contract import Layout, State
from plait.mixers.mamba import Mamba, Options


class MambaSSM(Mamba):
    """(B, T, d_model) -> the same: convolution, SiLU, a scan whose time steps each channel has of its own, gate."""

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, act_quant: bool = True
    ) -> None:
        options = Options(
            d_state=d_state, d_conv=d_conv, expand=expand, dt_rank="full", projections="separate"
        )
        super().__init__(options, d_model, linear=linear_config(act_quant))

    @classmethod
    def over(cls, mixer: Mamba) -> Self:
        """A model's own mixer as a MambaSSM: no copy, but one module under two classes."""
        face = cls.__new__(cls)
        face.__dict__ = mixer.__dict__
        return face

    def forward(self, x: Any, layout: Layout | None = None, state: State | None = None) -> Any:
        """x (B, T, d_model), whole sequences -> the same shape. With a layout it is a mixer's call, Mamba's own."""
        if layout is not None:
            return super().forward(x, layout, state)
        return super().forward(x, Layout.dense(x.shape[0], x.shape[1], device=x.device))[0]
