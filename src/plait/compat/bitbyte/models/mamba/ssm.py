"""State spaces by themselves: S4Kernel, which is the same for every input, and SelectiveSSM, which is not."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.compat.bitbyte.models.bitlinear import BitLinear
from plait.mixers.contract import Layout, State, state_dtype
from plait.mixers.mamba import Options as MambaOptions
from plait.mixers.s4d import S4D, Options
from plait.mixers.timestep import inverse_softplus_dt
from plait.nn.roles import VECTOR_FP32
from plait.ops.selective_scan import selective_scan


class S4Kernel(S4D):
    """(B, T, d_model) -> the same by Plait's S4D without its output map: complex modes, log-spaced, zero-order hold.

    ``trainable_dt`` False keeps the time steps as they are drawn.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        trainable_dt: bool = True,
    ) -> None:
        options = Options(
            d_state=d_state, A_init="log", dt_min=dt_min, dt_max=dt_max, activation="none", gate=False
        )
        super().__init__(options, d_model)
        self.out_proj = nn.Identity()  # type: ignore[assignment]
        self.log_dt.requires_grad_(trainable_dt)

    def residual_weights(self) -> list[Tensor]:
        """There is no output map."""
        return []

    def forward(self, x: Any, layout: Layout | None = None, state: State | None = None) -> Any:
        """x (B, T, d_model), whole sequences -> the same shape. With a layout it is a mixer's call, S4D's own."""
        if layout is not None:
            return super().forward(x, layout, state)
        return super().forward(x, Layout.dense(x.shape[0], x.shape[1], device=x.device))[0]

    @torch.no_grad()
    def kernel(self, length: int) -> Tensor:
        """(length, d_model): what an input of one at the first token makes of every later one."""
        impulse = torch.zeros(1, length, self.d_in, device=self.D.device)
        impulse[:, :1] = 1.0
        response: Tensor = self(impulse)[0]
        return response


class SelectiveSSM(nn.Module):
    """(B, T, d_model) -> the same: a diagonal state for each channel; time steps, B and C are ternary maps of x.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t + D x_t with dt = softplus(delta_proj(x) + dt_bias).
    """

    roles: ClassVar = dict.fromkeys(("A_log", "D", "dt_bias"), VECTOR_FP32)

    def __init__(self, d_model: int, d_state: int = 16, act_quant: bool = True) -> None:
        super().__init__()
        self.delta_proj = BitLinear(d_model, d_model, act_quant=act_quant)
        self.B_proj = BitLinear(d_model, d_state, act_quant=act_quant)
        self.C_proj = BitLinear(d_model, d_state, act_quant=act_quant)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_model, 1))
        self.D = nn.Parameter(torch.ones(d_model))
        o = MambaOptions()
        self.dt_bias = nn.Parameter(inverse_softplus_dt(self.D.detach(), o.dt_min, o.dt_max, o.dt_init_floor))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d_model), whole sequences."""
        y, _ = selective_scan(
            x,
            self.delta_proj(x),
            -torch.exp(self.A_log.to(state_dtype(self.A_log.dtype))),
            self.B_proj(x),
            self.C_proj(x),
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        return y
