"""What each op is called with in ``plait doctor``'s self-check: small shapes that reach every part of the op.

Three documents of different lengths are packed into one row, with initial states where the op has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait.ops.add_norm import add_norm
from plait.ops.attention import attention, cached_attention
from plait.ops.causal_conv1d import causal_conv1d
from plait.ops.causal_conv1d_update import causal_conv1d_update
from plait.ops.convolved_linear import convolved_linear
from plait.ops.cumulative_angle import cumulative_angle
from plait.ops.diagonal_ssm import diagonal_ssm
from plait.ops.gated_norm import gated_norm
from plait.ops.norm_linear import norm_linear
from plait.ops.selective_scan import selective_scan
from plait.ops.selective_state_update import selective_state_update
from plait.ops.ssd import ssd, trapezoidal_ssd
from plait.ops.ssd_update import ssd_update
from plait.ops.ternary import int8_rows, ternary_weight

LENGTHS = (70, 1, 37)  # longer than a chunk, a single token, and one that no tile divides
S, N_TOKENS = len(LENGTHS), sum(LENGTHS)

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """What an op is called with: ``run(**inputs, **fixed, backend=...)``; inputs are differentiated, if it can be."""

    run: Callable[..., Outputs]
    inputs: dict[str, Tensor]
    fixed: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True


class _Draw:
    """Random float32 tensors of a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)


def _packing() -> dict[str, Any]:
    bounds = [sum(LENGTHS[:i]) for i in range(S + 1)]
    return {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "max_len": max(LENGTHS)}


def _add_norm(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {"x": d.normal(N_TOKENS, 24), "y": d.normal(N_TOKENS, 24), "weight": d.normal(24)}
    return Case(add_norm, inputs)


def _attention(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "q": d.normal(1, N_TOKENS, 4, 8),
        "k": d.normal(1, N_TOKENS, 2, 8),
        "v": d.normal(1, N_TOKENS, 2, 8),
    }
    return Case(lambda **x: (attention(**x),), inputs, {**_packing(), "window": 24})


def _cached_attention(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    slots, new = 40, 3
    inputs = {"q": d.normal(S, new, 4, 8), "k": d.normal(S, slots, 2, 8), "v": d.normal(S, slots, 2, 8)}
    total = torch.tensor([3, 17, 40])
    positions = total[:, None] - new + torch.arange(new)
    return Case(lambda **x: (cached_attention(**x),), inputs, {"positions": positions, "total": total})


def _causal_conv1d(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(1, N_TOKENS, 12),
        "weight": d.normal(12, 4),
        "bias": d.normal(12),
        "initial_state": d.normal(S, 3, 12),
    }
    return Case(causal_conv1d, inputs, {**_packing(), "activation": "silu"})


def _causal_conv1d_update(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(S, 12),
        "state": d.normal(S, 3, 12),
        "weight": d.normal(12, 4),
        "bias": d.normal(12),
    }

    def run(state: Tensor, **x: Any) -> Outputs:
        state = state.clone()
        return causal_conv1d_update(state=state, **x), state

    return Case(run, inputs, {"activation": "silu"}, differentiable=False)


def _convolved_linear(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(S, 24),
        "weight": d.normal(10, 24),
        "bias": d.normal(10),
        "norm_weight": d.normal(24),
        "state": d.normal(S, 3, 6),
        "conv_weight": d.normal(6, 4),
        "conv_bias": d.normal(6),
    }

    def run(state: Tensor, **x: Any) -> Outputs:
        state = state.clone()
        return convolved_linear(state=state, **x), state

    return Case(run, inputs, {"first": 3, "eps": 1e-5, "group_size": 8}, differentiable=False)


def _cumulative_angle(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {"step": d.normal(1, N_TOKENS, 3, 4), "initial_state": d.between(0.0, 2 * math.pi, S, 3, 4)}

    def run(**x: Any) -> Outputs:
        # On the circle: near 0 and 2 pi, neighbouring angles are different numbers.
        angles = cumulative_angle(**x)
        return tuple(f(angle) for angle in angles for f in (torch.cos, torch.sin))

    return Case(run, inputs, _packing())


def _diagonal_ssm(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(1, N_TOKENS, 6),
        "dA": torch.complex(-d.between(0.01, 0.5, 6, 4), d.between(-2.0, 2.0, 6, 4)),
        "B": torch.complex(d.normal(6, 4), d.normal(6, 4)),
        "C": torch.complex(d.normal(6, 4), d.normal(6, 4)),
        "D": d.normal(6),
        "initial_state": d.normal(S, 6, 4, 2),
    }
    return Case(diagonal_ssm, inputs, _packing())


def _gated_norm(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {"x": d.normal(N_TOKENS, 24), "z": d.normal(N_TOKENS, 24), "weight": d.normal(24)}
    return Case(lambda **x: (gated_norm(**x),), inputs, {"group_size": 8})


def _int8_rows(generator: torch.Generator) -> Case:
    return Case(lambda **x: (int8_rows(**x),), {"x": _Draw(generator).normal(N_TOKENS, 24)})


def _norm_linear(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(S, 24),
        "weight": d.normal(10, 24),
        "bias": d.normal(10),
        "norm_weight": d.normal(24),
        "residual": d.normal(S, 10),
    }
    fixed = {"eps": 1e-5, "group_size": 8}
    return Case(lambda **x: (norm_linear(**x),), inputs, fixed, differentiable=False)


def _selective_scan(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(1, N_TOKENS, 12),
        "dt": d.normal(1, N_TOKENS, 12),
        "A": -d.between(0.1, 4.0, 12, 8),
        "B": d.normal(1, N_TOKENS, 2, 8),
        "C": d.normal(1, N_TOKENS, 2, 8),
        "D": d.normal(12),
        "z": d.normal(1, N_TOKENS, 12),
        "dt_bias": d.between(-4.0, -2.0, 12),
        "initial_state": d.normal(S, 12, 8),
    }
    return Case(selective_scan, inputs, {**_packing(), "dt_softplus": True})


def _selective_state_update(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(S, 12),
        "dt": d.normal(S, 5),
        "A": -d.between(0.1, 4.0, 12, 8),
        "B": d.normal(S, 8),
        "C": d.normal(S, 8),
        "D": d.normal(12),
        "state": d.normal(S, 12, 8),
        "z": d.normal(S, 12),
        "dt_bias": d.between(-1.0, 1.0, 12),
        "dt_weight": d.normal(12, 5),
    }

    def run(state: Tensor, **x: Any) -> Outputs:
        state = state.clone()
        return selective_state_update(state=state, **x), state

    return Case(run, inputs, {"dt_softplus": True}, differentiable=False)


def _ssd(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    inputs = {
        "x": d.normal(1, N_TOKENS, 4, 8),
        "dt": d.normal(1, N_TOKENS, 4),
        "A": -d.between(0.5, 4.0, 4),
        "B": d.normal(1, N_TOKENS, 2, 16),
        "C": d.normal(1, N_TOKENS, 2, 16),
        "D": d.normal(4, 8),
        "dt_bias": d.between(-4.0, -2.0, 4),
        "initial_state": d.normal(S, 4, 8, 16),
    }
    return Case(ssd, inputs, {**_packing(), "dt_softplus": True})


def _ssd_update(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    heads, width, groups, states = 4, 8, 2, 16
    channels = heads * width + 2 * groups * states
    inputs = {
        "z": d.normal(S, heads * width),
        "xbc": d.normal(S, channels),
        "dt": d.normal(S, heads),
        "conv_state": d.normal(S, 3, channels),
        "ssm_state": d.normal(S, heads, width, states),
        "conv_weight": d.normal(channels, 4),
        "conv_bias": d.normal(channels),
        "A": -d.between(0.5, 4.0, heads),
        "D": d.normal(heads, width),
        "dt_bias": d.between(-1.0, 1.0, heads),
    }

    def run(conv_state: Tensor, ssm_state: Tensor, **x: Any) -> Outputs:
        states = conv_state.clone(), ssm_state.clone()
        return ssd_update(conv_state=states[0], ssm_state=states[1], **x), *states

    return Case(run, inputs, {"ngroups": groups}, differentiable=False)


def _ternary_weight(generator: torch.Generator) -> Case:
    inputs = {"weight": _Draw(generator).normal(16, 24)}
    return Case(lambda **x: (ternary_weight(**x),), inputs, {"parts": (10, 4, 2), "ste": "clipped"})


def _trapezoidal_ssd(generator: torch.Generator) -> Case:
    d = _Draw(generator)
    rank, heads, width, states = 2, 3, 8, 16
    inputs = {
        "v": d.normal(1, N_TOKENS, heads, width),
        "k": d.normal(1, N_TOKENS, rank, heads, states),
        "q": d.normal(1, N_TOKENS, rank, heads, states),
        "log_decay": -d.between(0.01, 0.5, 1, N_TOKENS, heads),
        "dt": d.between(0.01, 0.5, 1, N_TOKENS, heads),
        "lam": d.between(0.1, 0.9, 1, N_TOKENS, heads),
        "rank_in": d.normal(heads, rank, width),
        "D": d.normal(heads),
        "ssm": d.normal(S, heads, width, states),
        "last_k": d.normal(S, rank, heads, states),
        "last_v": d.normal(S, heads, width),
    }

    def run(ssm: Tensor, last_k: Tensor, last_v: Tensor, **x: Any) -> Outputs:
        o, state = trapezoidal_ssd(**x, initial_state=(ssm, last_k, last_v))
        return (o, *state)

    return Case(run, inputs, _packing())


CASES: dict[str, Callable[[torch.Generator], Case]] = {
    "add_norm": _add_norm,
    "attention": _attention,
    "cached_attention": _cached_attention,
    "causal_conv1d": _causal_conv1d,
    "causal_conv1d_update": _causal_conv1d_update,
    "convolved_linear": _convolved_linear,
    "cumulative_angle": _cumulative_angle,
    "diagonal_ssm": _diagonal_ssm,
    "gated_norm": _gated_norm,
    "int8_rows": _int8_rows,
    "norm_linear": _norm_linear,
    "selective_scan": _selective_scan,
    "selective_state_update": _selective_state_update,
    "ssd": _ssd,
    "ssd_update": _ssd_update,
    "ternary_weight": _ternary_weight,
    "trapezoidal_ssd": _trapezoidal_ssd,
}
