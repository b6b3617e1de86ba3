"""MiniMamba's configurations (``save_to_json``): flat keys, translated into our schema.

A model only: text, tokenizer and training are left open. The model is Mamba as its paper means it: z through SiLU,
the time steps' bias once, their rank ("auto") rounded up. What MiniMamba computes otherwise belongs to the weights
that it trained, and comes with them (plait.formats.minimamba). Where a saved file names the rank, it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from plait.config.errors import ConfigError
from plait.config.section import Section

DERIVED = ("d_inner", "padded_vocab_size")  # what its files also tell, and follows from the rest
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class MiniMamba(Section):
    """The fields of MiniMamba's configurations, all classes together, under their own names."""

    d_model: int = Field(768, gt=0, description="width")
    n_layer: int = Field(12, gt=0, description="layers")
    d_state: int = Field(16, gt=0, description="states of a channel")
    d_conv: int = Field(4, gt=0, description="taps of the convolution")
    expand: int | float = Field(2, gt=0, description="inner width as a multiple of d_model")
    dt_rank: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="rank of the map to time steps; auto: d_model / 16, rounded up"
    )
    dt_min: float = Field(0.001, gt=0, description="smallest initial time step")
    dt_max: float = Field(0.1, gt=0, description="largest initial time step")
    dt_init: Literal["random", "constant"] = Field("random", description="weights to time steps")
    dt_scale: float = Field(1.0, gt=0, description="scale of those weights")
    dt_init_floor: float = Field(1e-4, gt=0, description="initial time steps are at least this")
    conv_bias: bool = Field(True, description="bias of the convolution")
    bias: bool = Field(False, description="bias of the projections, and of a language model's output")
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in norms")
    rms_norm: bool = Field(True, description="RMS norms; false: LayerNorms")
    use_fast_path: bool = Field(True, description="the fastest backend; false: plain torch")
    device: str | None = Field(None, description="where the model is")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = Field(
        None, description="of the weights"
    )
    gradient_checkpointing: bool = Field(False, description="recompute each layer in backward")
    vocab_size: int | None = Field(None, gt=0, description="token ids; null: a model of embeddings alone")
    pad_vocab_size_multiple: int = Field(8, gt=0, description="the table's rows are a multiple of it")
    tie_embeddings: bool = Field(True, description="the output's weight is the embedding's")
    num_labels: int | None = Field(None, gt=0, description="of a classifier; 1: a regression")
    pooling_strategy: Literal["last", "mean", "max"] = Field("last", description="of a classifier")
    dropout: float = Field(0.1, ge=0, lt=1, description="of a classifier, before its last map")


# Keys that no config of another system has at its top.
_MARKS = frozenset({"norm_epsilon", "rms_norm", "use_fast_path", "dt_init_floor"})


def recognise(values: Mapping[str, Any]) -> bool:
    """Whether a raw config is MiniMamba's: it has keys of MiniMamba's alone, and no section of a config of ours."""
    return not _MARKS.isdisjoint(values) and not any(isinstance(value, Mapping) for value in values.values())


def read(values: Mapping[str, Any]) -> MiniMamba:
    """The configuration that raw values describe; ConfigError, under MiniMamba's name, for what it may not say."""
    return MiniMamba.model_validate({key: value for key, value in values.items() if key not in DERIVED})


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run of this model in our schema; ConfigError for a key that a run cannot honour."""
    given = read(values)
    if not given.use_fast_path:
        raise ConfigError(
            "a run has no such key; leave it out and set the environment's PLAIT_BACKEND=portable",
            ("use_fast_path",),
        )
    if given.vocab_size is None:
        raise ConfigError("a run needs token ids: set it", ("vocab_size",))
    if given.dtype == "float64":
        raise ConfigError(f"a run's products are of {', '.join(PRECISIONS)}", ("dtype",))
    head: Literal["lm", "classification"] = "lm" if given.num_labels is None else "classification"
    return {
        "experiment_name": "minimamba",
        "model": model_section(given, head),
        "training": {
            "objective": "causal_lm" if head == "lm" else "classification",
            "device": given.device or "auto",
            "precision": PRECISIONS[given.dtype or "float32"],
            "activation_checkpointing": given.gradient_checkpointing,
        },
    }


def model_section(
    given: MiniMamba, head: Literal["lm", "classification", "features"], kind: str = "mamba"
) -> dict[str, Any]:
    """The model in our schema, its mixers of ``kind``; without a vocabulary its table has one row."""
    norm = {"kind": "rms" if given.rms_norm else "layer", "eps": given.norm_epsilon}
    heads: dict[str, dict[str, Any]] = {
        "lm": {"kind": "lm", "tie": given.tie_embeddings, "bias": given.bias},
        "classification": {
            "kind": "classification",
            "num_labels": given.num_labels,
            "pooling": given.pooling_strategy,
            "dropout": given.dropout,
        },
        "features": {"kind": "features"},
    }
    section = {
        "d_model": given.d_model,
        "n_layer": given.n_layer,
        "pattern": kind,
        "vocab_size": given.vocab_size or 1,
        # a classifier's table has no rows that only pad
        "pad_vocab_size_multiple": given.pad_vocab_size_multiple if head == "lm" else 1,
        "norm": norm,
        "final_norm": norm,
        "mlp": "none",
        "head": heads[head],
    }
    return section | ({"mamba": mixer_options(given)} if kind == "mamba" else {})


def mixer_options(given: MiniMamba) -> dict[str, Any]:
    """The options of Plait's Mamba."""
    names = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale")
    return {name: getattr(given, name) for name in (*names, "dt_init_floor", "bias", "conv_bias")}
