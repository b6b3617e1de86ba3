"""What a block is around its mixer: norm, residual, MLP, dropout, linear maps.

Each is a default of the whole model (``model.norm``), of a kind (``model.mamba2.norm``) or of one entry of
the pattern.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from plait.config.errors import ConfigError
from plait.config.section import Section

LinearKind = Literal["dense", "ternary"]
NormKind = Literal["rms", "layer", "none"]
MLPKind = Literal["none", "gelu", "gelu_tanh", "relu2", "swiglu"]


class NormConfig(Section):
    """A norm; shorthands: its kind (``rms``, ``layer``, ``none``) or its place (``pre``, ``post``)."""

    kind_free: ClassVar[frozenset[str]] = frozenset({"place"})

    kind: NormKind = Field("rms", description="RMSNorm, LayerNorm or none")
    place: Literal["pre", "post", "none"] = Field(
        "pre", description="before the mixer and MLP, or after each residual"
    )
    eps: float = Field(1e-5, gt=0, description="added to the variance")
    weight: bool = Field(True, description="learned scales")
    bias: bool | None = Field(None, description="learned offsets; null: for a LayerNorm with weights")

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """``"post"`` to ``{"place": "post"}``, any other word to ``{"kind": word}``."""
        if data is None or data is False:
            return {"kind": "none"}
        if isinstance(data, str):
            return {"place" if data in ("pre", "post") else "kind": data}
        return data

    @model_validator(mode="after")
    def _bias_fits(self) -> NormConfig:
        if self.bias and self.kind == "rms":
            raise ConfigError("an rms norm has no bias; use kind: layer", ("bias",))
        if self.bias and not self.weight:
            raise ConfigError("a norm without weights has no bias; set weight: true", ("bias",))
        return self


class ResidualConfig(Section):
    """How a block adds to its input; shorthands: ``yes``, ``no``, or the kind."""

    kind_free: ClassVar[frozenset[str]] = frozenset({"embedded"})

    kind: Literal["add", "none", "scaled"] = Field(
        "add", description="add, do not, or add with a learned scale"
    )
    embedded: bool = Field(False, description="add a learned share of the embedded input as well")

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """True to ``{"kind": "add"}``, False or None to none, a word to its kind."""
        if data is None or isinstance(data, bool):
            return {"kind": "add" if data else "none"}
        if isinstance(data, str):
            return {"kind": {"yes": "add", "no": "none"}.get(data, data)}
        return data


class LinearConfig(Section):
    """The linear maps of a block's mixer and MLP; shorthand: their kind.

    Ternary weights are -1, 0 or 1 times a scale in every forward; what is trained stays full (arXiv 2402.17764).
    """

    kind: LinearKind = Field("dense", description="full weights, or ternary ones")
    activations: Literal["int8", "none"] = Field(
        "int8", description="ternary: each token's inputs are rounded to 8 bits, or not"
    )
    ste: Literal["identity", "clipped"] = Field(
        "identity", description="ternary: gradients pass the rounding everywhere, or only where |W| <= scale"
    )
    scale: Literal["part", "matrix", "row"] = Field(
        "part",
        description="ternary: one scale for each of the matrices that are joined in a map (queries, keys, values), "
        "for the whole map, or for each output",
    )
    norm: bool = Field(False, description="ternary: an RMS norm with weights before each map")

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """A word to ``{"kind": word}``; None to dense."""
        if data is None:
            return {"kind": "dense"}
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _options_are_of_the_kind(self) -> LinearConfig:
        if self.kind == "dense":
            for name, field in type(self).model_fields.items():
                if name != "kind" and getattr(self, name) != field.default:
                    raise ConfigError(f"{name} is an option of ternary maps; set kind: ternary", (name,))
        return self


class MLPConfig(Section):
    """The MLP of a block; shorthand: its kind."""

    kind_free: ClassVar[frozenset[str]] = frozenset({"linear"})

    kind: MLPKind = Field("swiglu", description="activation, or none for a block without an MLP")
    width: int | None = Field(
        None, gt=0, description="hidden width; null: 4 d_model, for swiglu 8/3 d_model rounded up to 64"
    )
    bias: bool = Field(False, description="biases of its linear maps")
    linear: LinearConfig | None = Field(None, description="its linear maps; null: the block's")

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """A word to ``{"kind": word}``; None or False to none."""
        if data is None or data is False:
            return {"kind": "none"}
        return {"kind": data} if isinstance(data, str) else data


class BlockConfig(Section):
    """The options of a block; the whole model's, those of a kind or those of one layer."""

    norm: NormConfig = Field(default_factory=NormConfig, description="norm of the mixer and of the MLP")
    residual: ResidualConfig = Field(default_factory=ResidualConfig, description="the residual of both")
    mlp: MLPConfig = Field(default_factory=MLPConfig, description="the MLP after the mixer")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what each branch adds")
    linear: LinearConfig = Field(default_factory=LinearConfig, description="linear maps of mixer and MLP")
