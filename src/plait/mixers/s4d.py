"""S4D: a diagonal state-space layer whose dynamics do not depend on the input, real or complex.

Glossary: E channels (= d_model), N modes a channel (`d_state`); a complex mode stands for a conjugate pair.
    dA = dt A;   Bd = (exp(dA) - 1) / A B                                       zero-order hold
    h_t = exp(dA) h_{t-1} + Bd x_t;   y_t = sum_n C h_t + D x_t  (complex: 2 Re)
    out = glu(out_proj(gelu(y)))
Source: arXiv 2206.11893, sections 3 and 4: S4D-Lin (complex), S4D-Real (real), and log-spaced forms of both.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from plait.config.options import Options as MixerOptions
from plait.mixers.contract import Layout, Mixer, State, linear_flops, state_dtype
from plait.nn.linear import LinearSpec, make_linear
from plait.nn.roles import VECTOR_FP32
from plait.ops.diagonal_ssm import diagonal_ssm


class Options(MixerOptions):
    """Options of S4D."""

    d_state: int = Field(
        32, gt=0, description="N, modes a channel; complex ones count as a conjugate pair each"
    )
    modes: Literal["complex", "real"] = Field("complex", description="oscillating modes, or mere decays")
    A_init: Literal["linear", "log"] = Field(
        "linear",
        description="initial rates (real modes: 1, 2, ..., N) or frequencies (complex: 0, pi, ..., (N-1) pi "
        "at the rate 1/2), or the same spaced by equal factors (frequencies from pi to N pi)",
    )
    dt_min: float = Field(0.001, gt=0, description="smallest initial time step")
    dt_max: float = Field(0.1, gt=0, description="largest initial time step")
    activation: Literal["gelu", "silu", "none"] = Field(
        "gelu", description="on the output of the state space"
    )
    gate: bool = Field(True, description="the output projection is twice as wide and gates itself (GLU)")
    bias: bool = Field(True, description="bias of the output projection")


class S4D(Mixer):
    """(S, T, d_model) -> the same; its state is h (E, N), or (E, N, 2) for complex modes."""

    options_class: ClassVar = Options
    roles: ClassVar = dict.fromkeys(("log_dt", "A_log", "A_imag", "B", "C", "D"), VECTOR_FP32)

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
        self.is_complex = options.modes == "complex"
        self.shape = (d_model, options.d_state)
        pair = (2,) if self.is_complex else ()
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.A_log = nn.Parameter(torch.empty(self.shape))  # log(-Re A): the real part stays negative
        self.A_imag = nn.Parameter(torch.empty(self.shape)) if self.is_complex else None
        self.B = nn.Parameter(torch.empty(*self.shape, *pair))  # complex numbers as pairs (re, im)
        self.C = nn.Parameter(torch.empty(*self.shape, *pair))
        self.D = nn.Parameter(torch.empty(d_model))
        parts = [d_model, d_model] if options.gate else [d_model]
        self.out_proj = make_linear(d_model, sum(parts), bias=options.bias, kind=linear, parts=parts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Log-uniform time steps, A as ``A_init`` says, B and D one, C from N(0, 1), complex if modes are."""
        o = self.options
        N = o.d_state
        with torch.no_grad():
            self.log_dt.uniform_(math.log(o.dt_min), math.log(o.dt_max))
            place = torch.arange(N, device=self.A_log.device, dtype=torch.float32)
            log_rate = (place + 1).log() if o.A_init == "linear" else place * (math.log(N) / max(1, N - 1))
            if self.A_imag is None:
                self.A_log.copy_(log_rate.expand(self.shape))
                self.B.fill_(1.0)
                self.C.normal_()
            else:
                frequency = math.pi * (place if o.A_init == "linear" else log_rate.exp())
                self.A_log.fill_(math.log(0.5))
                self.A_imag.copy_(frequency.expand(self.shape))
                self.B.copy_(torch.tensor([1.0, 0.0], device=self.B.device).expand_as(self.B))
                self.C.normal_(std=math.sqrt(0.5))
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
        """ssm (S, E, N), or (S, E, N, 2) for complex modes, zero, in float32."""
        pair = (2,) if self.is_complex else ()
        return State(ssm=torch.zeros(n_seq, *self.shape, *pair, device=device, dtype=state_dtype(dtype)))

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract."""
        dA, B, C = self._discretise()
        y, ssm = diagonal_ssm(
            x,
            dA,
            B,
            C,
            self.D,
            initial_state=None if state is None else state["ssm"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
        )
        if self.options.activation != "none":
            y = F.gelu(y) if self.options.activation == "gelu" else F.silu(y)
        y = self.out_proj(y)
        return F.glu(y, -1) if self.options.gate else y, None if state is None else State(ssm=ssm)

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """The projection, and the recurrence: decay, update and read of every state element."""
        each = 14 if self.is_complex else 5
        return n_new * (linear_flops(self) + each * self.shape[0] * self.shape[1])

    def _discretise(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt A, Bd and C (E, N) in float32 at least, complex for complex modes."""
        wide = state_dtype(self.A_log.dtype)
        dt = self.log_dt.to(wide).exp()[:, None]
        real = -self.A_log.to(wide).exp()
        B, C = self.B.to(wide), self.C.to(wide)
        if self.A_imag is None:
            return dt * real, torch.expm1(dt * real) / real * B, C
        A = torch.complex(real, self.A_imag.to(wide))
        B, C = torch.view_as_complex(B), torch.view_as_complex(C)
        return dt * A, _expm1(dt * real, dt * A.imag) / A * B, C


def _expm1(a: Tensor, b: Tensor) -> Tensor:
    """exp(a + ib) - 1 without the cancellation near 0: a small time step would lose half of its digits."""
    return torch.complex(torch.expm1(a) * b.cos() - 2 * (0.5 * b).sin().square(), a.exp() * b.sin())
