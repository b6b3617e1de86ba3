"""The kinds of linear map a layer may be built from; a new kind is one entry of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from plait.config.errors import BuildError, nearest
from plait.config.schema import LinearConfig
from plait.nn.roles import declare_parts
from plait.nn.ternary import TernaryLinear

LinearSpec = LinearConfig | str
"""What a block hands its mixer and MLP as ``linear``: the section, or the name of a kind with its defaults."""

Parts = Sequence[int]
"""Numbers of outputs, first to last, of the matrices that are joined in one map; zeros are left out."""


def _dense(d_in: int, d_out: int, bias: bool, config: LinearConfig, parts: Parts) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=bias)


def _ternary(d_in: int, d_out: int, bias: bool, config: LinearConfig, parts: Parts) -> nn.Linear:
    return TernaryLinear(d_in, d_out, bias=bias, config=config, parts=parts)


LINEARS: dict[str, Callable[[int, int, bool, LinearConfig, Parts], nn.Linear]] = {
    "dense": _dense,
    "ternary": _ternary,
}


def linear_kind(spec: LinearSpec) -> str:
    """The name of the kind."""
    return spec if isinstance(spec, str) else spec.kind


def make_linear(
    d_in: int, d_out: int, *, bias: bool = False, kind: LinearSpec = "dense", parts: Parts | None = None
) -> nn.Linear:
    """A map from (..., d_in) to (..., d_out) of the given kind; ``parts`` sum to d_out (None: it is one matrix)."""
    name = linear_kind(kind)
    if name not in LINEARS:
        raise BuildError(
            f"linear: {name!r} is not a kind of linear; known: {', '.join(LINEARS)}{nearest(name, LINEARS)}"
        )
    config = LinearConfig(kind=kind) if isinstance(kind, str) else kind
    sizes = [d_out] if parts is None else [size for size in parts if size]
    if sum(sizes) != d_out:
        raise BuildError(f"linear: the parts {list(parts or [])} do not sum to the {d_out} outputs")
    layer = LINEARS[name](d_in, d_out, bias, config, sizes)
    declare_parts(layer, "weight", sizes)
    return layer
