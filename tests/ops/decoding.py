"""Inputs of the ops of decoding, as their projections hand them over, and running them on copies of the states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops import dispatch
from plait.ops.causal_conv1d_update import CAUSAL_CONV1D_UPDATE, causal_conv1d_update
from plait.ops.convolved_linear import CONVOLVED_LINEAR, convolved_linear
from plait.ops.norm_linear import NORM_LINEAR, norm_linear
from plait.ops.selective_state_update import SELECTIVE_STATE_UPDATE, selective_state_update
from plait.ops.ssd_update import SSD_UPDATE, ssd_update

Tensors = dict[str, Tensor | None]

OPS: list[tuple[dispatch.Op, Callable[..., Tensor]]] = [
    (NORM_LINEAR, norm_linear),
    (CONVOLVED_LINEAR, convolved_linear),
    (CAUSAL_CONV1D_UPDATE, causal_conv1d_update),
    (SELECTIVE_STATE_UPDATE, selective_state_update),
    (SSD_UPDATE, ssd_update),
]
STATES = ("state", "conv_state", "ssm_state")
WIDE = ("ssm_state", "A", "D", "dt_bias", "norm_weight")
"""What stays in float32 where the model is narrower."""


class Draw:
    """Normal numbers in float64, cast at the end."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + 100)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def columns(self, rows: int, *widths: int) -> tuple[Tensor, ...]:
        """Neighbouring columns of one matrix, as of a projection."""
        return self.normal(rows, sum(widths)).split(list(widths), 1)


def for_norm_linear(rows: int, d_in: int, d_out: int, seed: int = 0) -> Tensors:
    d = Draw(seed)
    return {
        "x": d.normal(rows, d_in),
        "weight": d.normal(d_out, d_in) * d_in**-0.5,
        "bias": d.normal(d_out),
        "norm_weight": d.between(0.5, 1.5, d_in),
        "residual": d.normal(rows, d_out),
    }


def for_convolved(rows: int, d_in: int, d_out: int, channels: int, taps: int, seed: int = 0) -> Tensors:
    t, more = for_norm_linear(rows, d_in, d_out, seed), for_convolution(rows, channels, taps, seed + 1)
    own = {name: t[name] for name in ("x", "weight", "bias", "norm_weight")}
    return {**own, "state": more["state"], "conv_weight": more["weight"], "conv_bias": more["bias"]}


def for_convolution(rows: int, channels: int, taps: int, seed: int = 0) -> Tensors:
    d = Draw(seed)
    x, _ = d.columns(rows, channels, 3)
    return {
        "x": x,
        "state": d.normal(rows, taps - 1, channels),
        "weight": d.normal(channels, taps),
        "bias": d.normal(channels),
    }


def for_selective(rows: int, channels: int, states: int, rank: int | None, seed: int = 0) -> Tensors:
    d = Draw(seed)
    _, z = d.columns(rows, channels, channels)
    dt, B, C = d.columns(rows, channels if rank is None else rank, states, states)
    return {
        "x": d.normal(rows, channels),
        "dt": dt,
        "A": -d.between(0.01, 4.0, channels, states),
        "B": B,
        "C": C,
        "D": d.normal(channels),
        "state": d.normal(rows, channels, states),
        "z": z,
        "dt_bias": d.between(-4.0, 1.0, channels),
        "dt_weight": None if rank is None else d.normal(channels, rank) * rank**-0.5,
    }


def for_ssd(
    rows: int, heads: int, width: int, states: int, groups: int, taps: int = 4, *, each: bool = False, seed: int = 0
) -> Tensors:  # fmt: skip
    """`each`: a skip weight a channel."""
    d = Draw(seed)
    channels = heads * width + 2 * groups * states
    z, xbc, dt = d.columns(rows, heads * width, channels, heads)
    return {
        "z": z,
        "xbc": xbc,
        "dt": dt,
        "conv_state": d.normal(rows, taps - 1, channels),
        "ssm_state": d.normal(rows, heads, width, states),
        "conv_weight": d.normal(channels, taps),
        "conv_bias": d.normal(channels),
        "A": -d.between(0.01, 4.0, heads),
        "D": d.normal(heads, width) if each else d.normal(heads),
        "dt_bias": d.between(-4.0, 1.0, heads),
    }


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """As a model of `dtype` has them; columns of a matrix stay such."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    wide = (*WIDE, "state") if "A" in tensors else WIDE  # a convolution's state is of the model's dtype
    return {name: None if t is None else t.to(kept if name in wide else dtype) for name, t in tensors.items()}


def widened(tensors: Tensors) -> Tensors:
    """The same numbers in float64."""
    return {name: None if t is None else t.double() for name, t in tensors.items()}


class Result(NamedTuple):
    """What an op gave, and its states after it."""

    y: Tensor
    states: dict[str, Tensor]


def call(op: Callable[..., Tensor], tensors: Tensors, backend: str, **options: Any) -> Result:
    """Run on copies of the states."""
    own = {name: t.clone() for name, t in tensors.items() if name in STATES and t is not None}
    y = op(**{**tensors, **own}, backend=backend, **options)
    return Result(y, own)


def backends(op: dispatch.Op, dtype: torch.dtype) -> list[str]:
    """Those that run on a CPU and are judged."""
    return [
        name for name in op.targets if name not in ("gpu", "reference") and dtype in op.dtypes.get(name, (dtype,))
    ]  # fmt: skip
