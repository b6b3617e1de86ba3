"""GPTConfig: a nanochat model in nanochat's own names, and the same model in ours."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from plait.config.originals.nanochat import model_section
from plait.config.schema import ModelConfig

NAMES = {"attention": "T", "mamba": "M"}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; JSON can hold it, and nothing changes it: ``block_pattern`` None stays None."""

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6  # of queries
    n_kv_head: int = 6  # of keys and values
    n_embd: int = 768
    block_pattern: list[str] | None = None  # a block type for each layer; None: T in all
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int | float = 2
    mamba_use_mlp: bool = False


def values_of(config: object) -> dict[str, Any]:
    """The fields of a GPTConfig, read from any object that has them; what it lacks has its default."""
    return {field.name: getattr(config, field.name, field.default) for field in fields(GPTConfig)}


def model_config(config: object) -> ModelConfig:
    """The model that a GPTConfig describes, in our schema.

    ConfigError, a ValueError, names the field that is wrong: "must match" for a pattern of another length than
    n_layer, "Unknown block type" for a name in it that nothing has.
    """
    return ModelConfig.model_validate(model_section(values_of(config)))


def gpt_config_of(model: ModelConfig, sequence_len: int) -> GPTConfig:
    """The GPTConfig of a model of ours, as far as its fields tell; ``block_pattern`` None if all blocks are T."""
    layers = model.layers()
    values: dict[str, Any] = {"sequence_len": sequence_len, "n_layer": len(layers), "n_embd": model.d_model}
    if model.vocab_size is not None:
        values["vocab_size"] = model.vocab_size
    options = {layer.kind: layer.options.model_dump() for layer in reversed(layers)}
    heads = options.get("attention", {}).get("n_head") or max(1, model.d_model // 128)
    values["n_head"], values["n_kv_head"] = heads, options.get("attention", {}).get("n_kv_head") or heads
    pattern = [NAMES.get(layer.kind, layer.kind) for layer in layers]
    mamba = options.get("mamba")
    if mamba is not None:
        values |= {f"mamba_{name}": mamba[name] for name in ("d_state", "d_conv")}
        expand = float(mamba["expand"])
        values["mamba_expand"] = int(expand) if expand.is_integer() else expand
        values["mamba_use_mlp"] = any(x.kind == "mamba" and x.block.mlp.kind != "none" for x in layers)
    return GPTConfig(**values, block_pattern=None if set(pattern) == {"T"} else pattern)
