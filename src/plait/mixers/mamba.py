"""Mamba-1: a selective state-space layer with a diagonal state for every channel and a short convolution.

Glossary: E inner width, N state size (`d_state`), r rank of the time step (`dt_rank`), W taps (`d_conv`).
    [x, z] = in_proj(u);   x = silu(conv(x));   [dt_r, B, C] = x_proj(x);   dt = softplus(W_dt dt_r + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;   y_t = h_t C_t + D x_t;   out = out_proj(y * silu(z))
Separate projections: dt = softplus(dt_proj(x) + dt_bias), B = B_proj(x), C = C_proj(x), each with a weight of its own.
Source: arXiv 2312.00752, section 3. Parameters have the names and shapes of state-spaces checkpoints.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from plait.config.errors import ConfigError
from plait.config.options import Options as MixerOptions
from plait.mixers.constants import constant, decay_rates
from plait.mixers.contract import Layout, Mixer, State, linear_flops, one_each, state_dtype
from plait.mixers.timestep import inverse_softplus_dt
from plait.nn.joined import convolves, joins, plain, project, project_convolved
from plait.nn.linear import LinearSpec, make_linear
from plait.nn.roles import MATRIX, VECTOR_FP32
from plait.ops.causal_conv1d import causal_conv1d
from plait.ops.causal_conv1d_update import causal_conv1d_update
from plait.ops.selective_scan import selective_scan
from plait.ops.selective_state_update import selective_state_update


class Options(MixerOptions):
    """Options of Mamba-1."""

    d_state: int = Field(16, gt=0, description="N, the state size of a channel")
    d_conv: int = Field(4, gt=0, description="taps of the convolution")
    expand: float = Field(2, gt=0, description="inner width as a multiple of d_model")
    dt_rank: Literal["auto", "full"] | Annotated[int, Field(gt=0)] = Field(
        "auto",
        description="rank of the projection to time steps; auto: d_model / 16, rounded up; full: one square matrix",
    )
    projections: Literal["joined", "separate"] = Field(
        "joined",
        description="to dt, B and C: one map, and time steps from dt by full weights; or maps of their own, each of "
        "the block's linear kind",
    )
    gate: Literal["silu", "identity"] = Field(
        "silu", description="what z goes through before it multiplies y"
    )
    dt_min: float = Field(0.001, gt=0, description="smallest initial time step")
    dt_max: float = Field(0.1, gt=0, description="largest initial time step")
    dt_init_floor: float = Field(1e-4, gt=0, description="initial time steps are at least this")
    dt_init: Literal["random", "constant"] = Field(
        "random",
        description="weights to time steps: uniform up to dt_scale / sqrt(dt_rank), or all equal to it",
    )
    dt_scale: float = Field(1.0, gt=0, description="scale of those weights")
    dt_bias_scale: float = Field(1.0, gt=0, description="factor of the time steps' bias wherever it is used")
    bias: bool = Field(False, description="bias of the input and output projections")
    conv_bias: bool = Field(True, description="bias of the convolution")

    @model_validator(mode="after")
    def _time_step_weights_can_be_drawn(self) -> Options:
        if self.projections == "separate" and (self.dt_init != "random" or self.dt_scale != 1):
            name = "dt_init" if self.dt_init != "random" else "dt_scale"
            raise ConfigError(
                f"{name} is of joined projections; separate ones begin as any linear map", (name,)
            )
        return self


class TimeStep(nn.Module):
    """(..., r) -> (..., E), the time steps before bias and softplus; its bias is added once, inside the scan.

    Not an nn.Linear, because its bias begins at the inverse softplus of time steps and is kept in float32.
    """

    roles: ClassVar = {"weight": MATRIX, "bias": VECTOR_FP32}

    def __init__(self, options: Options, dt_rank: int, d_inner: int) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(d_inner, dt_rank))
        self.bias = nn.Parameter(torch.empty(d_inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as ``dt_init`` says, time steps log-uniform in (dt_min, dt_max)."""
        o = self.options
        bound = self.weight.shape[1] ** -0.5 * o.dt_scale
        if o.dt_init == "random":
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.constant_(self.weight, bound)
        with torch.no_grad():
            self.bias.copy_(_initial_bias(self.bias, o))

    def forward(self, dt: Tensor) -> Tensor:
        """dt: (..., r)."""
        return F.linear(dt, self.weight)


def _initial_bias(like: Tensor, o: Options) -> Tensor:
    return inverse_softplus_dt(like, o.dt_min, o.dt_max, o.dt_init_floor) / o.dt_bias_scale


class Mamba(Mixer):
    """(S, T, d_model) -> the same; its state is the convolution's last W-1 inputs and h (E, N)."""

    options_class: ClassVar = Options
    roles: ClassVar = {"A_log": VECTOR_FP32, "D": VECTOR_FP32, "dt_bias": VECTOR_FP32}

    def __init__(
        self,
        options: Options,
        d_model: int,
        *,
        causal: bool = True,
        layer_index: int = 0,
        linear: LinearSpec = "dense",
    ) -> None:
        super().__init__(d_in=d_model, d_out=d_model)
        self.options = options
        self.d_inner = int(options.expand * d_model)
        self.d_state = options.d_state
        self.full_rank = options.dt_rank == "full"
        named = {"auto": math.ceil(d_model / 16), "full": self.d_inner}
        self.dt_rank = named[options.dt_rank] if isinstance(options.dt_rank, str) else options.dt_rank
        parts = [self.d_inner, self.d_inner]
        self.in_proj = make_linear(d_model, sum(parts), bias=options.bias, kind=linear, parts=parts)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, options.d_conv, groups=self.d_inner, bias=options.conv_bias
        )
        self.separate = options.projections == "separate"
        if self.separate:
            self.dt_down = None if self.full_rank else make_linear(self.d_inner, self.dt_rank, kind=linear)
            self.dt_proj: nn.Linear | TimeStep = make_linear(self.dt_rank, self.d_inner, kind=linear)
            self.B_proj = make_linear(self.d_inner, self.d_state, kind=linear)
            self.C_proj = make_linear(self.d_inner, self.d_state, kind=linear)
            self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        else:
            self.widths = [0 if self.full_rank else self.dt_rank, self.d_state, self.d_state]
            self.x_proj = make_linear(self.d_inner, sum(self.widths), kind=linear, parts=self.widths)
            self.dt_proj = TimeStep(options, self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = make_linear(self.d_inner, d_model, bias=options.bias, kind=linear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """-A = 1..N in every channel (S4D-Real, arXiv 2206.11893) and D one; the layers draw their own."""
        with torch.no_grad():
            rates = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
            self.D.fill_(1.0)
            if self.separate:
                self.dt_bias.copy_(_initial_bias(self.dt_bias, self.options))

    def residual_weights(self) -> list[Tensor]:
        """The output projection."""
        return [self.out_proj.weight]

    def init_state(
        self,
        n_seq: int,
        capacity: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """conv (S, W-1, E) in ``dtype`` and ssm (S, E, N) in float32, both zero."""
        taps = self.options.d_conv - 1
        return State(
            conv=torch.zeros(n_seq, taps, self.d_inner, device=device, dtype=dtype),
            ssm=torch.zeros(n_seq, self.d_inner, self.d_state, device=device, dtype=state_dtype(dtype)),
        )

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract."""
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        dt, B, C, dt_bias = self._selection(u)
        gated = self.options.gate == "silu"
        y, ssm = selective_scan(
            u,
            dt,
            constant(self.A_log, decay_rates),
            B,
            C,
            self.D,
            z=z if gated else None,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_state=None if state is None else state["ssm"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        y = self.out_proj(y if gated else y * z)
        # under autocast the convolution ran in a lower precision than its state is kept in
        return y, None if state is None else State(conv=conv.to(state["conv"].dtype), ssm=ssm)

    @torch.no_grad()
    def step_residual(self, x: Tensor, norm: nn.Module, layout: Layout, state: State) -> Tensor:
        """See the contract; one token of each sequence in four kernels on a GPU."""
        maps = [self.in_proj, self.out_proj, *([] if self.separate else [self.x_proj])]
        own = plain(self.dt_proj, nn.Linear if self.separate else TimeStep) and plain(self.conv1d, nn.Conv1d)
        if not (own and one_each(x, layout, state) and joins(x, norm, *maps)):
            return super().step_residual(x, norm, layout, state)
        rows = x[:, 0]
        if convolves(x):
            u, z = project_convolved(rows, self.in_proj, norm, 0, state["conv"], self.conv1d).chunk(2, -1)
        else:
            u, z = project(rows, self.in_proj, norm).chunk(2, -1)
            taps = self.conv1d.weight.squeeze(1)
            u = causal_conv1d_update(u, state["conv"], taps, self.conv1d.bias, activation="silu")
        dt_weight: Tensor | None = None
        if self.separate:
            dt, B, C, dt_bias = self._selection(u)
        else:
            dt, B, C = project(u, self.x_proj).split(self.widths, -1)
            dt_bias = self._scaled(self.dt_proj.bias)
            if self.full_rank:
                dt = self.dt_proj(u)
            else:
                dt_weight = self.dt_proj.weight
        gated = self.options.gate == "silu"
        y = selective_state_update(
            u,
            dt,
            constant(self.A_log, decay_rates),
            B,
            C,
            self.D,
            state["ssm"],
            z=z if gated else None,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_weight=dt_weight,
        )
        return project(y if gated else y * z, self.out_proj, residual=rows)[:, None]

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """Projections, convolution, and the recurrence: decay, update and read of every state element."""
        dt = 0 if self.separate else 2 * self.d_inner * self.dt_rank  # a linear map only if it is separate
        conv = 2 * self.d_inner * self.options.d_conv
        return n_new * (linear_flops(self) + dt + conv + 5 * self.d_inner * self.d_state)

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From u (..., E): time steps (..., E) before their bias and softplus, B and C (..., N), the bias (E,)."""
        if self.separate:
            dt = self.dt_proj(u if self.dt_down is None else self.dt_down(u))
            B, C, bias = self.B_proj(u), self.C_proj(u), self.dt_bias
        else:
            low, B, C = self.x_proj(u).split(self.widths, -1)
            dt, bias = self.dt_proj(u if self.full_rank else low), self.dt_proj.bias
        return dt, B, C, self._scaled(bias)

    def _scaled(self, bias: Tensor) -> Tensor:
        scale = self.options.dt_bias_scale
        return bias if scale == 1 else bias * scale
