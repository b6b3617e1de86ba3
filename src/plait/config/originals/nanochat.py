"""nanochat's configs (October 2025, with the hybrid's block_pattern): flat keys, translated into our schema.

    depth = 20
    block_pattern = ["T"] * 12 + ["M"] * 8
    mamba_d_state = 16
    max_seq_len = 2048

Keys that are left out have nanochat's own defaults. The size rule: n_embd = 64 depth, n_head = n_embd / 128 rounded
up, n_kv_head = n_head. Two things are not nanochat's: what is neither matrix nor embedding (Mamba's A, D, time steps,
convolution), which its optimizers cannot take, is trained by AdamW at the output's rate; and CORE is evaluated where
its tasks are known (``training.core_tasks``), so without ``core_metric_every`` it is not asked for.

``release = 2026`` means the settings of July 2026 instead: nanochat2026.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from plait.config.errors import ConfigError
from plait.config.explain import show
from plait.config.originals import nanochat2026
from plait.config.originals.nanochat2026 import RELEASE, BaseTrain2026
from plait.config.pattern import parse_pattern
from plait.config.recipes import read_recipe
from plait.config.section import Section
from plait.config.text import plain
from plait.config.words import counted

RECIPE = "nanochat"  # what the settings do not say
HORIZONS = ("steps", "epochs", "tokens_per_parameter", "flops")

# Kinds of the table that are a user's whole block, with norms and residuals of its own (plait.compat.nanochat.blocks).
WHOLE_BLOCKS: set[str] = set()


class BaseTrain(Section):
    """The settings of nanochat's pretraining under their own names."""

    release: int = Field(2025, description="2025: these settings; 2026: those of July 2026")
    run: str = Field("dummy", description="names the run; dummy: the model's tag does")
    model_tag: str = Field("", description="names the model; empty: d<depth>")
    device_type: str = Field("", description="cuda, cpu or mps; empty: the best there is")
    depth: int = Field(20, gt=0, description="layers; the width is 64 times as many")
    max_seq_len: int = Field(2048, gt=0, description="tokens a row")
    block_pattern: list[Any] | str | None = Field(
        None, description="a block type for each layer; None: all T"
    )
    mamba_d_state: int = Field(16, gt=0, description="state size of a channel")
    mamba_d_conv: int = Field(4, gt=0, description="taps of the convolution")
    mamba_expand: int | float = Field(2, gt=0, description="inner width as a multiple of the model's")
    mamba_use_mlp: bool = Field(False, description="an MLP after each Mamba")
    num_iterations: int = Field(-1, description="steps; -1: by target_flops or target_param_data_ratio")
    target_flops: float = Field(-1.0, description="operations of the whole run; -1: not by them")
    target_param_data_ratio: float = Field(20, description="tokens a parameter; -1: not by them")
    device_batch_size: int = Field(32, gt=0, description="rows of a forward on one device")
    total_batch_size: int = Field(524288, gt=0, description="tokens of a step")
    embedding_lr: float = Field(0.2, gt=0, description="of the embedding, by AdamW, at width 768")
    unembedding_lr: float = Field(0.004, gt=0, description="of the output, by AdamW, at width 768")
    weight_decay: float = Field(0.0, ge=0, description="of embedding and output")
    matrix_lr: float = Field(0.02, gt=0, description="of the matrices, by Muon")
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: any")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the run in which the rates go up")
    warmdown_ratio: float = Field(0.2, ge=0, le=1, description="share of the run in which they go down")
    final_lr_frac: float = Field(0.0, ge=0, le=1, description="the last rates, as a share of the first")
    eval_every: int = Field(250, description="steps between evaluations; -1: at the end alone")
    eval_tokens: int = Field(20 * 524288, gt=0, description="held-out tokens of an evaluation")
    core_metric_every: int = Field(2000, description="steps between evaluations of CORE; -1: none")
    core_metric_max_per_task: int = Field(500, description="items of a task of CORE at most; -1: all")
    sample_every: int = Field(2000, description="steps between samples; -1: none")


# Keys that no config of another system has at its top.
_MARKS = frozenset(
    {"depth", "block_pattern", "max_seq_len", "device_batch_size", "total_batch_size", "matrix_lr"}
    | {"target_param_data_ratio", "target_flops", "num_iterations", "unembedding_lr", "mamba_use_mlp"}
    | {"release", "aspect_ratio", "window_pattern", "scalar_lr", "core_metric_every"}
)


def recognise(values: Mapping[str, Any]) -> bool:
    """Whether a raw config is nanochat's: it has keys of nanochat's alone, and no section of a config of ours."""
    return not _MARKS.isdisjoint(values) and not any(isinstance(value, Mapping) for value in values.values())


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The run that nanochat's settings describe, in our schema; ConfigError, under nanochat's name, if it cannot be.

    The text is not nanochat's to say here: ``data.train`` is left open, and a tokenizer like nanochat's is trained on
    it unless ``tokenizer.path`` names one.
    """
    if release_of(values) == RELEASE:
        return nanochat2026.translate(values)
    for name in values:
        if name in BaseTrain2026.model_fields and name not in BaseTrain.model_fields:
            raise ConfigError("it is a setting of July 2026: set release to 2026", (name,))
    given = BaseTrain.model_validate(values)
    name = given.model_tag or f"d{given.depth}"
    model = model_section(gpt_values(given))
    return {
        "experiment_name": name if given.run in ("", "dummy") else given.run,
        "model": model,
        "tokenizer": read_recipe(RECIPE)["tokenizer"],
        "data": {
            "sequence_length": given.max_seq_len,
            "documents": "joined",  # one stream of <|bos|> and text: nothing is reset at a document's end
            "validation_split": "last_file",
            "shuffle": False,
        },
        "training": _training(given),
    }


def release_of(values: Mapping[str, Any]) -> int:
    """Which nanochat settings are of: 2025, if they do not say, or 2026."""
    given = values.get("release", 2025)
    if str(given) not in ("2025", str(RELEASE)):
        raise ConfigError(f"expected 2025 (October) or {RELEASE} (July); got {show(given)}", ("release",))
    return int(given)


def gpt_values(given: BaseTrain) -> dict[str, Any]:
    """The fields of nanochat's GPTConfig but the vocabulary, by its size rule."""
    width = 64 * given.depth
    heads = -(-width // 128)
    return {
        "sequence_len": given.max_seq_len,
        "n_layer": given.depth,
        "n_head": heads,
        "n_kv_head": heads,
        "n_embd": width,
        "block_pattern": given.block_pattern,
        "mamba_d_state": given.mamba_d_state,
        "mamba_d_conv": given.mamba_d_conv,
        "mamba_expand": given.mamba_expand,
        "mamba_use_mlp": given.mamba_use_mlp,
    }


def model_section(gpt: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a GPTConfig as a model in our schema; ConfigError if the pattern does not fit them."""
    layers = resolved_pattern(gpt["block_pattern"], gpt["n_layer"])
    model: dict[str, Any] = {
        "preset": "nanochat",
        "d_model": gpt["n_embd"],
        "n_layer": gpt["n_layer"],
        "pattern": layers,
        "attention": {"n_head": gpt["n_head"], "n_kv_head": gpt["n_kv_head"]},
        "mamba": {
            "d_state": gpt["mamba_d_state"],
            "d_conv": gpt["mamba_d_conv"],
            "expand": gpt["mamba_expand"],
            "mlp": "relu2" if gpt["mamba_use_mlp"] else "none",  # Mamba has its own gate
        },
        "vocab_size": gpt.get("vocab_size"),
    }
    for kind in sorted(WHOLE_BLOCKS & {entry.kind for entry in parse_pattern(layers)}):
        model[kind] = {"norm": "none", "residual": "none", "mlp": "none", "config": plain(dict(gpt))}
    return model


def resolved_pattern(pattern: Iterable[Any] | None, n_layer: int) -> list[Any]:
    """A block type for each layer, "T" for all if none are given; ConfigError if they do not fit."""
    if pattern is None:
        return ["T"] * n_layer
    given = pattern if isinstance(pattern, str) else list(pattern)
    try:
        entries = parse_pattern(given)
    except ConfigError as error:
        raise ConfigError(f"Unknown block type: {error.text}", ("block_pattern", *error.path)) from None
    if len(entries) != n_layer:
        raise ConfigError(
            f"it has {counted(len(entries), 'block type')}, which must match the {counted(n_layer, 'layer')}",
            ("block_pattern",),
        )
    return [entry.kind for entry in entries] if isinstance(given, str) else given


def _training(given: BaseTrain) -> dict[str, Any]:
    rows = given.device_batch_size * given.max_seq_len
    if given.total_batch_size % given.max_seq_len or given.total_batch_size < rows:
        raise ConfigError(
            f"{given.total_batch_size} tokens a step are not whole rows of max_seq_len {given.max_seq_len}, at least "
            f"device_batch_size {given.device_batch_size} of them",
            ("total_batch_size",),
        )
    recipe = {key: value for key, value in read_recipe(RECIPE)["training"].items() if key not in HORIZONS}
    return {
        **recipe,
        **_horizon(given),
        "batch_tokens": given.total_batch_size,
        "micro_batch_tokens": rows,
        "lr": given.unembedding_lr,
        "embedding_lr": given.embedding_lr,
        "unembedding_lr": given.unembedding_lr,
        "muon_lr": given.matrix_lr,
        "groups": _decays(given),
        "grad_clip": given.grad_clip or None,
        "schedule": "wsd" if given.warmdown_ratio else "constant",
        "decay_fraction": given.warmdown_ratio or 1.0,  # of no effect where the rates do not go down
        "warmup": given.warmup_ratio,
        "min_lr_ratio": given.final_lr_frac,
        "eval_every": max(0, given.eval_every),
        "eval_tokens": given.eval_tokens,
        "core_every": max(0, given.core_metric_every) if "core_metric_every" in given.model_fields_set else 0,
        "core_max_per_task": given.core_metric_max_per_task if given.core_metric_max_per_task > 0 else None,
        "sample_every": max(0, given.sample_every),
        "device": given.device_type or "auto",
    }


def _horizon(given: BaseTrain) -> dict[str, Any]:
    if given.num_iterations > 0:
        return {"steps": given.num_iterations}
    if given.target_flops > 0:
        return {"flops": given.target_flops}
    if given.target_param_data_ratio > 0:
        return {"tokens_per_parameter": given.target_param_data_ratio}
    raise ConfigError(
        "nothing says how long to train: set num_iterations, target_flops or target_param_data_ratio above 0",
        ("num_iterations",),
    )


def _decays(given: BaseTrain) -> dict[str, Any]:
    """nanochat's weight decay is AdamW's, of the embedding and the output; its Muon has none."""
    if not given.weight_decay:
        return {}
    return {
        name: {"weight_decay": given.weight_decay}
        for name in ("embedding.tokens.weight", "head.unembedding.weight")
    }
