"""The kinds of linear map a layer may be built from; a new kind is one entry of the table."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from plait.config.errors import BuildError, nearest

LINEARS: dict[str, Callable[..., nn.Linear]] = {"dense": nn.Linear}


def make_linear(d_in: int, d_out: int, *, bias: bool = False, kind: str = "dense") -> nn.Linear:
    """A map from (..., d_in) to (..., d_out) of the given kind."""
    if kind not in LINEARS:
        raise BuildError(
            f"linear: {kind!r} is not a kind of linear; known: {', '.join(LINEARS)}{nearest(kind, LINEARS)}"
        )
    return LINEARS[kind](d_in, d_out, bias=bias)
