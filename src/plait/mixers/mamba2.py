"""Mamba-2: a state-space layer with one scalar decay a head (SSD), a short convolution and a gated norm.

Glossary: E inner width, H heads of width P (`headdim`), N state size (`d_state`), G groups of B and C, W taps.
    [z, x, B, C, dt] = in_proj(u);   [x, B, C] = silu(conv([x, B, C]));   dt = clamp(softplus(dt + dt_bias))
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;   y_t = S_t C_t + D x_t;   out = out_proj(norm(y * silu(z)))
Source: arXiv 2405.21060, sections 5 to 7. Parameters have the names and shapes of state-spaces checkpoints.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.config.options import Options as MixerOptions
from plait.mixers.constants import constant, decay_rates
from plait.mixers.contract import Layout, Mixer, State, linear_flops, one_each, state_dtype
from plait.mixers.timestep import inverse_softplus_dt
from plait.nn.joined import convolves, joins, plain, project, project_convolved
from plait.nn.linear import LinearSpec, make_linear
from plait.nn.norm import RMSNorm
from plait.nn.roles import VECTOR_FP32
from plait.ops.causal_conv1d import causal_conv1d
from plait.ops.ssd import ssd
from plait.ops.ssd_update import ssd_update


class Options(MixerOptions):
    """Options of Mamba-2."""

    d_state: int = Field(128, gt=0, description="N, the state size of a head's channel")
    d_conv: int = Field(4, gt=0, description="taps of the convolution")
    expand: float = Field(2, gt=0, description="inner width as a multiple of d_model")
    headdim: int = Field(64, gt=0, description="P, the width of a head")
    d_ssm: int | None = Field(
        None, gt=0, description="width that runs through the SSM; the rest is a gated MLP"
    )
    ngroups: int = Field(1, gt=0, description="G, groups of heads that share B and C")
    A_init_range: tuple[float, float] = Field((1.0, 16.0), description="-A is drawn uniformly from it")
    D_has_hdim: bool = Field(False, description="one skip weight a channel instead of one a head")
    dt_min: float = Field(0.001, gt=0, description="smallest initial time step")
    dt_max: float = Field(0.1, gt=0, description="largest initial time step")
    dt_init_floor: float = Field(1e-4, gt=0, description="initial time steps are at least this")
    dt_limit: tuple[float, float] = Field((0.0, math.inf), description="time steps are clamped to it")
    gate_norm: bool = Field(True, description="gated RMS norm before the output; without it only the gate")
    norm_before_gate: bool = Field(False, description="normalise, then gate, instead of the reverse")
    bias: bool = Field(False, description="bias of the projections")
    conv_bias: bool = Field(True, description="bias of the convolution")


class Mamba2(Mixer):
    """(S, T, d_model) -> the same; its state is the convolution's last W-1 inputs and S (H, P, N)."""

    options_class: ClassVar = Options
    roles: ClassVar = {"dt_bias": VECTOR_FP32, "A_log": VECTOR_FP32, "D": VECTOR_FP32}

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
        self.d_ssm = options.d_ssm or self.d_inner
        self.d_mlp = self.d_inner - self.d_ssm
        self.headdim, self.d_state, self.ngroups = options.headdim, options.d_state, options.ngroups
        self.n_head = self.d_ssm // self.headdim
        where = f"layer {layer_index} (mamba2)"
        if self.d_mlp < 0:
            raise BuildError(f"{where}: d_ssm {self.d_ssm} exceeds the inner width {self.d_inner}")
        if self.d_ssm % self.headdim:
            raise BuildError(
                f"{where}: the inner width {self.d_ssm} is not a multiple of headdim {self.headdim}"
            )
        if self.n_head % self.ngroups:
            raise BuildError(
                f"{where}: {self.n_head} heads cannot be shared by ngroups {self.ngroups}; it must divide them"
            )
        self.dt_limit = options.dt_limit
        self.d_xbc = self.d_ssm + 2 * self.ngroups * self.d_state
        states = self.ngroups * self.d_state
        parts = [self.d_mlp, self.d_mlp, self.d_ssm, self.d_ssm, states, states, self.n_head]
        self.in_proj = make_linear(d_model, sum(parts), bias=options.bias, kind=linear, parts=parts)
        self.conv1d = nn.Conv1d(
            self.d_xbc, self.d_xbc, options.d_conv, groups=self.d_xbc, bias=options.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(self.n_head))
        self.A_log = nn.Parameter(torch.empty(self.n_head))
        self.D = nn.Parameter(torch.empty(self.d_ssm if options.D_has_hdim else self.n_head))
        self.norm = (
            RMSNorm(
                self.d_ssm,
                group_size=self.d_ssm // self.ngroups,
                norm_before_gate=options.norm_before_gate,
            )
            if options.gate_norm
            else None
        )
        self.out_proj = make_linear(self.d_inner, d_model, bias=options.bias, kind=linear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Time steps log-uniform in (dt_min, dt_max), -A uniform in A_init_range, D one (mamba.md's table)."""
        o = self.options
        with torch.no_grad():
            self.dt_bias.copy_(inverse_softplus_dt(self.dt_bias, o.dt_min, o.dt_max, o.dt_init_floor))
            self.A_log.uniform_(*o.A_init_range).log_()
            self.D.fill_(1.0)

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
        """conv (S, W-1, E + 2GN) in ``dtype`` and ssm (S, H, P, N) in float32, both zero."""
        taps = self.options.d_conv - 1
        return State(
            conv=torch.zeros(n_seq, taps, self.d_xbc, device=device, dtype=dtype),
            ssm=torch.zeros(
                n_seq, self.n_head, self.headdim, self.d_state, device=device, dtype=state_dtype(dtype)
            ),
        )

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract."""
        mlp_gate, mlp_x, z, xbc, dt = self.in_proj(x).split(self._parts(), -1)
        xbc, conv = causal_conv1d(
            xbc,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        states = self.ngroups * self.d_state
        v, B, C = xbc.split([self.d_ssm, states, states], -1)
        y, ssm = ssd(
            v.unflatten(-1, (self.n_head, self.headdim)),
            dt,
            constant(self.A_log, decay_rates),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
            self._skip(),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=None if state is None else state["ssm"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        y = y.flatten(-2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        if self.d_mlp:
            y = torch.cat([F.silu(mlp_gate) * mlp_x, y], -1)
        y = self.out_proj(y)
        # autocast may have made the convolution's input narrower than the state is
        return y, None if state is None else State(conv=conv.to(state["conv"].dtype), ssm=ssm)

    @torch.no_grad()
    def step_residual(self, x: Tensor, norm: nn.Module, layout: Layout, state: State) -> Tensor:
        """See the contract; one token of each sequence in three kernels, its norm joined with the output projection."""
        own = plain(self.conv1d, nn.Conv1d) and (self.norm is None or plain(self.norm, RMSNorm))
        if not (own and one_each(x, layout, state) and joins(x, norm, self.in_proj, self.out_proj)):
            return super().step_residual(x, norm, layout, state)
        rows, last = x[:, 0], self.norm
        conv: tuple[Tensor | None, ...] = (None, None, None)
        if convolves(x):
            first = 2 * self.d_mlp + self.d_ssm
            projected = project_convolved(rows, self.in_proj, norm, first, state["conv"], self.conv1d)
        else:
            projected = project(rows, self.in_proj, norm)
            conv = state["conv"], self.conv1d.weight.squeeze(1), self.conv1d.bias
        mlp_gate, mlp_x, z, xbc, dt = projected.split(self._parts(), -1)
        gate_first = last is None or not last.norm_before_gate
        y = ssd_update(
            z if gate_first else None,
            xbc,
            dt,
            conv[0],
            state["ssm"],
            conv[1],
            conv[2],
            constant(self.A_log, decay_rates),
            self._skip(),
            self.dt_bias,
            ngroups=self.ngroups,
            dt_limit=self.dt_limit,
        )
        if last is not None and not gate_first:
            y, last = last(y, z), None
        if self.d_mlp:
            y, last = torch.cat([F.silu(mlp_gate) * mlp_x, y if last is None else last(y)], -1), None
        return project(y, self.out_proj, last, residual=rows)[:, None]

    def _parts(self) -> list[int]:
        """Columns of the input projection: gate and values of the MLP, z, what is convolved, dt."""
        return [self.d_mlp, self.d_mlp, self.d_ssm, self.d_xbc, self.n_head]

    def _skip(self) -> Tensor:
        """D (H,) or (H, P)."""
        return self.D.unflatten(0, (self.n_head, self.headdim)) if self.options.D_has_hdim else self.D

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """Projections, convolution, and the recurrence: decay, update and read of every state element."""
        conv = 2 * self.d_xbc * self.options.d_conv
        return n_new * (linear_flops(self) + conv + 5 * self.d_ssm * self.d_state)
