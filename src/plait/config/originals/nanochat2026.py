"""nanochat's pretraining of July 2026: one dial, the depth; the rest follows from it.

    width      depth x aspect_ratio, rounded up to whole heads
    N          parameters of the blocks' matrices and of the output; D = target_param_data_ratio x N tokens to train on
    batch      2^19 (D / D12)^0.383 tokens, to the nearest power of two (arXiv 2505.13738); D12: of depth 12
    rates      times sqrt(batch / 2^19)
    decay      of the matrices, times sqrt(batch / 2^19) D12 / D (arXiv 2405.13698)

What is tuned for depth 12 stands in the recipe nanochat2026. Not nanochat's: documents are joined in their order, not
fitted into rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from plait.config.errors import ConfigError
from plait.config.explain import show
from plait.config.recipes import read_recipe
from plait.config.section import Section

RECIPE = "nanochat2026"
RELEASE = 2026
DEPTH, BATCH, GROWTH = 12, 2**19, 0.383  # of the reference, and how the batch grows with the tokens
PADDED = 64  # the vocabulary's rows are a multiple of it
TILE = 128  # short windows are multiples of it
VALUE_GATE = 12  # channels that open a value embedding


class BaseTrain2026(Section):
    """The settings under their own names; dashes and underscores are alike."""

    release: int = Field(RELEASE, description="2026: these settings; 2025: those of October 2025")
    run: str = Field("dummy", description="names the run; dummy: the model's tag does")
    model_tag: str | None = Field(None, description="names the model; None: d<depth>")
    device_type: str = Field("", description="cuda, cpu or mps; empty: the best there is")
    fp8: bool = Field(False, description="products in 8 bits: not there")
    depth: int = Field(20, gt=0, description="layers; what is not set follows from it")
    aspect_ratio: int = Field(64, gt=0, description="width for each layer")
    head_dim: int = Field(128, gt=0, description="width of a head")
    max_seq_len: int = Field(2048, gt=0, description="tokens a row")
    window_pattern: str = Field(
        "SSSL", description="S: a quarter of the row, L: all of it; in turn, the last layer L"
    )
    vocab_size: int = Field(32768, gt=0, description="ids of the tokenizer; the output is counted with them")
    num_iterations: int = Field(-1, description="steps; -1: by target_flops or target_param_data_ratio")
    target_flops: float = Field(-1.0, description="operations of the whole run; -1: not by them")
    target_param_data_ratio: float = Field(12, description="tokens a counted parameter; -1: not by them")
    device_batch_size: int = Field(32, gt=0, description="rows of a forward on one device")
    total_batch_size: int = Field(-1, description="tokens of a step; -1: by the depth")
    embedding_lr: float = Field(0.3, gt=0, description="of the embedding, at width 768 and depth 12")
    unembedding_lr: float = Field(0.008, gt=0, description="of the output, at width 768 and depth 12")
    weight_decay: float = Field(0.28, ge=0, description="of the matrices, at depth 12")
    matrix_lr: float = Field(0.02, gt=0, description="of the matrices, by Muon, at depth 12")
    scalar_lr: float = Field(0.5, gt=0, description="of the layers' scales and shares, at depth 12")
    warmup_steps: int = Field(40, ge=0, description="steps in which the rates go up")
    warmdown_ratio: float = Field(0.65, ge=0, le=1, description="share of the run in which they go down")
    final_lr_frac: float = Field(0.05, ge=0, le=1, description="the last rates, as a share of the first")
    eval_every: int = Field(250, description="steps between evaluations; -1: at the end alone")
    eval_tokens: int = Field(80 * 524288, gt=0, description="held-out tokens of an evaluation")
    core_metric_every: int = Field(2000, description="steps between evaluations of CORE; -1: none")
    core_metric_max_per_task: int = Field(500, description="items of a task of CORE at most; -1: all")
    sample_every: int = Field(2000, description="steps between samples; -1: none")
    save_every: int = Field(-1, description="steps between checkpoints; -1: at the end alone")


@dataclass(frozen=True)
class Scaling:
    """What follows from the depth."""

    batch_tokens: int
    rates: float  # factor of the learning rates
    decay: float  # factor of the matrices' weight decay


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The run that the settings describe, in our schema; ConfigError, under nanochat's name, if it cannot be."""
    given = BaseTrain2026.model_validate(values)
    if given.fp8:
        raise ConfigError("products in 8 bits are not there: leave it out, they are in bfloat16", ("fp8",))
    recipe = read_recipe(RECIPE)
    gpt = gpt_values(given)
    name = given.model_tag or f"d{given.depth}"
    return {
        "experiment_name": name if given.run in ("", "dummy") else given.run,
        "model": model_section(gpt | {"vocab_size": None}, given.window_pattern),
        "tokenizer": {**recipe["tokenizer"], "vocab_size": given.vocab_size},
        "data": {
            "sequence_length": given.max_seq_len,
            "documents": "joined",
            "validation_split": "last_file",
            "shuffle": False,
        },
        "training": _training(given, recipe["training"], scaling(given)),
    }


def gpt_values(given: BaseTrain2026, depth: int | None = None) -> dict[str, Any]:
    """The fields of nanochat's GPTConfig but the windows, by its size rule; of another depth if one is given."""
    layers = given.depth if depth is None else depth
    heads = -(-layers * given.aspect_ratio // given.head_dim)
    return {
        "sequence_len": given.max_seq_len,
        "vocab_size": given.vocab_size,
        "n_layer": layers,
        "n_head": heads,
        "n_kv_head": heads,
        "n_embd": heads * given.head_dim,
    }


def model_section(gpt: Mapping[str, Any], windows: Any) -> dict[str, Any]:
    """The fields of a GPTConfig of July 2026 as a model in our schema; ConfigError for other letters than S and L."""
    if not isinstance(windows, str) or not windows or set(windows.upper()) - set("SL"):
        raise ConfigError(f"it must be letters S and L; got {show(windows)}", ("window_pattern",))
    n_layer = gpt["n_layer"]
    letters = [windows.upper()[i % len(windows)] for i in range(n_layer - 1)] + ["L"]
    # ours count the token itself
    sizes = {"S": short_window(gpt["sequence_len"]) + 1, "L": gpt["sequence_len"] + 1}
    return {
        "preset": RECIPE,
        "d_model": gpt["n_embd"],
        "n_layer": n_layer,
        "pattern": [
            {
                "mixer": "attention",
                "window": sizes[letter],
                "value_embedding": has_value_embedding(i, n_layer),
            }
            for i, letter in enumerate(letters)
        ],
        "attention": {"n_head": gpt["n_head"], "n_kv_head": gpt["n_kv_head"]},
        "vocab_size": gpt["vocab_size"],
    }


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every second layer has one, the last among them."""
    return layer % 2 == (n_layer - 1) % 2


def short_window(sequence_len: int) -> int:
    """Tokens to the left in a short window: a quarter of the sequence, rounded up to whole tiles."""
    return -(-sequence_len // (4 * TILE)) * TILE


def counted_parameters(gpt: Mapping[str, Any]) -> int:
    """N: the matrices of the blocks and the output, its rows padded; no embeddings, no scalars."""
    layers, width, heads = gpt["n_layer"], gpt["n_embd"], gpt["n_kv_head"]
    gates = sum(has_value_embedding(i, layers) for i in range(layers)) * heads * VALUE_GATE
    rows = -(-gpt["vocab_size"] // PADDED) * PADDED
    return layers * (4 + 8) * width * width + gates + width * rows


def scaling(given: BaseTrain2026) -> Scaling:
    """The batch, if it is not given, and the factors of rates and decay.

    The tokens of a run are in proportion to N, so their ratio to those of depth 12 does not ask how many there are.
    """
    longer = counted_parameters(gpt_values(given)) / counted_parameters(gpt_values(given, DEPTH))
    batch = given.total_batch_size
    if batch <= 0:
        batch = 2 ** round(math.log2(BATCH * longer**GROWTH))
    rates = math.sqrt(batch / BATCH)
    return Scaling(batch, rates, rates / longer)


def _training(given: BaseTrain2026, recipe: Mapping[str, Any], scale: Scaling) -> dict[str, Any]:
    if scale.batch_tokens % given.max_seq_len:
        raise ConfigError(
            f"{scale.batch_tokens} tokens a step are not whole rows of max_seq_len {given.max_seq_len}",
            ("total_batch_size" if given.total_batch_size > 0 else "max_seq_len",),
        )
    groups = {name: dict(group) for name, group in recipe["groups"].items()}
    groups["*.value_embedding.table.weight"]["lr"] = given.embedding_lr * 0.5 * scale.rates
    groups["*.input_mix.scale"]["lr"] = given.scalar_lr * 0.01 * scale.rates
    groups["*.input_mix.share"]["lr"] = given.scalar_lr * scale.rates
    return {
        **{key: value for key, value in recipe.items() if key not in _HORIZONS},
        **_horizon(given),
        "batch_tokens": scale.batch_tokens,
        "micro_batch_tokens": min(given.device_batch_size * given.max_seq_len, scale.batch_tokens),
        "lr": given.scalar_lr * scale.rates,
        "embedding_lr": given.embedding_lr * scale.rates,
        "unembedding_lr": given.unembedding_lr * scale.rates,
        "muon_lr": given.matrix_lr * scale.rates,
        "weight_decay": given.weight_decay * scale.decay,
        "groups": groups,
        "schedule": "wsd" if given.warmdown_ratio else "constant",
        "decay_fraction": given.warmdown_ratio or 1.0,  # of no effect where the rates do not go down
        "warmup": given.warmup_steps,
        "min_lr_ratio": given.final_lr_frac,
        "eval_every": max(0, given.eval_every),
        "eval_tokens": given.eval_tokens,
        "core_every": max(0, given.core_metric_every) if "core_metric_every" in given.model_fields_set else 0,
        "core_max_per_task": given.core_metric_max_per_task if given.core_metric_max_per_task > 0 else None,
        "sample_every": max(0, given.sample_every),
        "checkpoint_every": max(0, given.save_every),
        "device": given.device_type or "auto",
    }


_HORIZONS = ("steps", "epochs", "tokens_per_parameter", "parameters_counted", "flops")


def _horizon(given: BaseTrain2026) -> dict[str, Any]:
    if given.num_iterations > 0:
        return {"steps": given.num_iterations}
    if given.target_flops > 0:
        return {"flops": given.target_flops}
    if given.target_param_data_ratio > 0:
        return {"tokens_per_parameter": given.target_param_data_ratio, "parameters_counted": "matrices"}
    raise ConfigError(
        "nothing says how long to train: set num_iterations, target_flops or target_param_data_ratio above 0",
        ("num_iterations",),
    )
