"""Mamba-3: a state space with a trapezoidal update, rotating keys and queries, and no convolution.

Glossary: E inner width, H heads of width P (`headdim`), N state size (`d_state`), G groups of B and C,
R ranks (1 without MIMO), Ra angles; f the activation of the decay, Rot_t the rotation by theta_t.
    [z, x, B, C, dd_dt, dd_A, trap, angles] = in_proj(u)
    dt = softplus(dd_dt + dt_bias);   A = min(-f(dd_A), -A_floor);   lam = sigmoid(trap)
    theta_t = theta_{t-1} + pi tanh(angles_t) dt_t  (mod 2 pi)
    k_t = Rot_t(B_norm(B) + B_bias);   q_t = Rot_t(C_norm(C) + C_bias);   v_{t,r} = x_t mimo_x_r
    S_t = exp(A dt) S_{t-1} + exp(A dt) dt (1 - lam) v_{t-1} k_{t-1}^T + dt lam v_t k_t^T
    o_t = S_t q_t + D v_t;   y_t = sum_r mimo_o_r o_{t,r} silu(z_t mimo_z_r);   out = out_proj(y)
Source: arXiv 2603.15569. Parameters have the names and shapes of state-spaces checkpoints.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from plait.config.errors import BuildError, ConfigError
from plait.config.options import Options as MixerOptions
from plait.mixers.contract import Layout, Mixer, State, linear_flops, one_each, state_dtype
from plait.mixers.timestep import inverse_softplus_dt
from plait.nn.joined import joins, project
from plait.nn.linear import LinearSpec, make_linear
from plait.nn.norm import RMSNorm
from plait.nn.roles import VECTOR_FP32
from plait.nn.rope import rotate_pairs
from plait.ops.cumulative_angle import cumulative_angle
from plait.ops.ssd import trapezoidal_ssd


class Options(MixerOptions):
    """Options of Mamba-3."""

    d_state: int = Field(128, gt=0, multiple_of=2, description="N, the state size of a head's channel")
    expand: float = Field(2, gt=0, description="inner width as a multiple of d_model")
    headdim: int = Field(64, gt=0, description="P, the width of a head")
    ngroups: int = Field(1, gt=0, description="G, groups of heads that share B and C")
    is_mimo: bool = Field(False, description="several inputs and outputs a head (MIMO) instead of one (SISO)")
    mimo_rank: int | None = Field(None, gt=0, description="R, ranks of a MIMO layer; None: 4")
    rope_fraction: float = Field(0.5, gt=0, le=1, description="share of the state that rotates")
    rope_pairs: Literal["interleaved", "halves"] | None = Field(
        None,
        description="rotate channels (2i, 2i+1) or (i, i + N/2); None: as published, interleaved for "
        "SISO and halves for MIMO",
    )
    a_activation: Literal["heavy_tail", "softplus"] = Field(
        "heavy_tail",
        description="decay rates from their projection x: 1 + x, and 1 / (1 - x) below 0; or softplus. "
        "Weights of state-spaces 2.3.2 want softplus, later ones heavy_tail, and the files do not say",
    )
    A_floor: float = Field(1e-4, ge=0, description="decay rates are at least this")
    out_norm: bool = Field(False, description="RMS norm of every head before the gate")
    dt_min: float = Field(0.001, gt=0, description="smallest initial time step")
    dt_max: float = Field(0.1, gt=0, description="largest initial time step")
    dt_init_floor: float = Field(1e-4, gt=0, description="initial time steps are at least this")

    @model_validator(mode="after")
    def _rank_counts(self) -> Options:
        if self.mimo_rank is not None and not self.is_mimo:
            raise ConfigError(
                "a SISO layer has one rank; set is_mimo: true, or leave mimo_rank out", ("mimo_rank",)
            )
        return self


class Mamba3(Mixer):
    """(S, T, d_model) -> the same; its state is theta (H, Ra), S (H, P, N), last k (R, H, N), v (H, P)."""

    options_class: ClassVar = Options
    roles: ClassVar = dict.fromkeys(
        ("dt_bias", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o"), VECTOR_FP32
    )

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
        self.headdim, self.d_state, self.ngroups = options.headdim, options.d_state, options.ngroups
        self.n_head = self.d_inner // self.headdim
        self.is_mimo = options.is_mimo
        self.rank = (options.mimo_rank or 4) if options.is_mimo else 1
        self.n_angles = int(self.d_state * options.rope_fraction) // 2
        self.rope_pairs = options.rope_pairs or ("halves" if self.is_mimo else "interleaved")
        where = f"layer {layer_index} (mamba3)"
        if self.d_inner % self.headdim:
            raise BuildError(
                f"{where}: the inner width {self.d_inner} is not a multiple of headdim {self.headdim}"
            )
        if self.n_head % self.ngroups:
            raise BuildError(
                f"{where}: ngroups {self.ngroups} does not divide the {self.n_head} heads that share them"
            )
        if self.n_angles == 0:
            raise BuildError(
                f"{where}: rope_fraction {options.rope_fraction} of d_state {self.d_state} is less than one "
                "pair; raise one of them"
            )
        states = self.rank * self.ngroups * self.d_state
        self.widths = [self.d_inner, self.d_inner, states, states, *[self.n_head] * 3, self.n_angles]
        self.in_proj = make_linear(d_model, sum(self.widths), kind=linear, parts=self.widths)
        self.dt_bias = nn.Parameter(torch.empty(self.n_head))
        self.B_bias = nn.Parameter(torch.empty(self.n_head, self.rank, self.d_state))
        self.C_bias = nn.Parameter(torch.empty(self.n_head, self.rank, self.d_state))
        self.B_norm = RMSNorm(self.d_state)
        self.C_norm = RMSNorm(self.d_state)
        self.D = nn.Parameter(torch.empty(self.n_head))
        mimo = (self.n_head, self.rank, self.headdim)
        self.mimo_x = nn.Parameter(torch.empty(mimo)) if self.is_mimo else None
        self.mimo_z = nn.Parameter(torch.empty(mimo)) if self.is_mimo else None
        self.mimo_o = nn.Parameter(torch.empty(mimo)) if self.is_mimo else None
        self.norm = (
            RMSNorm(self.d_inner, group_size=self.headdim, norm_before_gate=True)
            if options.out_norm
            else None
        )
        self.out_proj = make_linear(self.d_inner, d_model, kind=linear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Time steps log-uniform in (dt_min, dt_max); B and C biases, D, mimo_z one; mimo_x, mimo_o 1 / R."""
        o = self.options
        with torch.no_grad():
            self.dt_bias.copy_(inverse_softplus_dt(self.dt_bias, o.dt_min, o.dt_max, o.dt_init_floor))
            for ones in (self.B_bias, self.C_bias, self.D):
                ones.fill_(1.0)
            for mimo, value in (
                (self.mimo_x, 1 / self.rank),
                (self.mimo_z, 1.0),
                (self.mimo_o, 1 / self.rank),
            ):
                if mimo is not None:
                    mimo.fill_(value)

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
        """angle (S, H, Ra), ssm (S, H, P, N), k (S, R, H, N) rotated, and v (S, H, P): zeros in float32."""
        H, P, N = self.n_head, self.headdim, self.d_state
        shapes = {"angle": (H, self.n_angles), "ssm": (H, P, N), "k": (self.rank, H, N), "v": (H, P)}
        wide = state_dtype(dtype)
        return State({name: torch.zeros(n_seq, *s, device=device, dtype=wide) for name, s in shapes.items()})

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract."""
        y, new = self._mix(self.in_proj(x), layout, state)
        return self.out_proj(y), None if state is None else new

    @torch.no_grad()
    def step_residual(self, x: Tensor, norm: nn.Module, layout: Layout, state: State) -> Tensor:
        """See the contract; the projections of one token of each sequence are joined with norm and residual."""
        if not (one_each(x, layout, state) and joins(x, norm, self.in_proj, self.out_proj)):
            return super().step_residual(x, norm, layout, state)
        rows = x[:, 0]
        y, new = self._mix(project(rows, self.in_proj, norm)[:, None], layout, state)
        state.write(new)
        return project(y[:, 0], self.out_proj, residual=rows)[:, None]

    def _mix(self, projected: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State]:
        """From the input projection (..., sum(widths)) to what the output projection is given (..., E)."""
        z, v, B, C, dd_dt, dd_A, trap, angles = projected.split(self.widths, -1)
        # pointwise, or a sum along time: in float32 whatever the model's dtype; autocast does not touch it
        wide = state_dtype(projected.dtype)
        dt = F.softplus(dd_dt.to(wide) + self.dt_bias.to(wide))
        turn = math.pi * torch.tanh(angles.to(wide)).unsqueeze(-2) * dt.unsqueeze(-1)
        theta, angle = cumulative_angle(
            turn,
            initial_state=None if state is None else state["angle"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        v = v.unflatten(-1, (self.n_head, self.headdim))
        o, (ssm, k, last) = trapezoidal_ssd(
            v,
            self._rotated(B, self.B_norm, self.B_bias, theta),
            self._rotated(C, self.C_norm, self.C_bias, theta),
            -self._decay_rate(dd_A.to(wide)) * dt,
            dt,
            torch.sigmoid(trap.to(wide)),
            rank_in=self.mimo_x,
            D=self.D,
            initial_state=None if state is None else (state["ssm"], state["k"], state["v"]),
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        return self._gated(o, z), State(angle=angle, ssm=ssm, k=k, v=last)

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """Projections, and the recurrence: decay of every state element, update and read by every rank."""
        return n_new * (linear_flops(self) + (1 + 4 * self.rank) * self.d_inner * self.d_state)

    def _decay_rate(self, x: Tensor) -> Tensor:
        """-A (..., H) from its projection."""
        if self.options.a_activation == "softplus":
            rate = F.softplus(x)
        else:  # a sum, not a choice: no branch can divide by zero
            rate = F.relu(x) + 1 / (1 - x.clamp(max=0))
        return rate.clamp(min=self.options.A_floor)

    def _rotated(self, x: Tensor, norm: RMSNorm, bias: Tensor, theta: Tensor) -> Tensor:
        """B or C (..., R G N) to keys or queries (..., R, H, N): norm, bias of each head, rotation."""
        wide = theta.dtype
        x = x.unflatten(-1, (self.rank, self.ngroups, 1, self.d_state)).to(wide)
        x = norm(x)
        x = x.expand(*x.shape[:-2], self.n_head // self.ngroups, self.d_state).flatten(-3, -2)
        x = x + bias.to(wide).transpose(0, 1)
        if self.rope_pairs == "halves":  # channels whose pair does not turn: an angle of zero
            theta = F.pad(theta, (0, self.d_state // 2 - self.n_angles))
        theta = theta.unsqueeze(-3)
        return rotate_pairs(x, theta.cos(), theta.sin(), interleaved=self.rope_pairs == "interleaved")

    def _gated(self, o: Tensor, z: Tensor) -> Tensor:
        """The outputs of the ranks (..., R, H, P) gated by z (..., E) and summed: (..., E)."""
        gate = z.unsqueeze(-2)
        if self.mimo_z is not None:
            gate = gate * self.mimo_z.transpose(0, 1).flatten(-2).to(z.dtype)
        y = o.flatten(-2)
        y = y * F.silu(gate) if self.norm is None else self.norm(y, gate)
        if self.mimo_o is None:
            return y.squeeze(-2)
        return (y * self.mimo_o.transpose(0, 1).flatten(-2).to(y.dtype)).sum(-2)
