"""How a model's weights begin; `models/init.py` does what stands here.

A mixer's special parameters (A_log, D, time steps, convolutions, gates) begin as their own papers say, whatever
stands here: these options are about plain linear maps, tables and learned scales.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from plait.config.section import Section


class InitConfig(Section):
    """Initial weights; shorthand: the scheme. A bare ``init_std`` in a model's config is ``init: {std: ...}``."""

    scheme: Literal["normal", "fan_in", "uniform"] = Field(
        "normal",
        description="linear maps of attention, MLPs and heads: N(0, std); fan_in: N(0, s min(1, sqrt(fan_out / "
        "fan_in))) with s = 1 / sqrt(fan_in); uniform: with standard deviation s",
    )
    std: float = Field(
        0.02, gt=0, description="standard deviation of scheme normal, of the tables, of the head"
    )
    embedding: float | None = Field(
        None, gt=0, description="standard deviation of the embedding's tables; null: std"
    )
    head: float | None = Field(
        None, ge=0, description="standard deviation of an untied output's weight; null: std; 0: zeros"
    )
    mlp: float = Field(1.0, gt=0, description="factor of the first map of each MLP")
    output: Literal["depth", "zero", "plain"] = Field(
        "depth",
        description="maps that write into the residual stream: divided by the root of their number, zero, or as others",
    )
    scale: tuple[float, float] = Field(
        (1.0, 1.0), description="learned residual scales, of the first and of the last layer; evenly between"
    )
    share: tuple[float, float] = Field(
        (0.0, 0.0), description="learned shares of the embedded input, likewise"
    )

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """A word to ``{"scheme": word}``."""
        return {"scheme": data} if isinstance(data, str) else data
