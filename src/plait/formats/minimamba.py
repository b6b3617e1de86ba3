"""MiniMamba's models: language models, classifiers and features, from a state dict and its configuration.

Its numbers differ from Mamba's in three ways, which the converted model's options name: z gates without SiLU
(``gate: identity``), the bias of the time steps is added twice (``dt_bias_scale: 2``) and their rank is rounded
down (``dt_rank``). Its language models also spread probability over rows that only pad the vocabulary
(``head.padded``). Its mask reaches the pooling alone; ours keeps pads from everything, equal for pads on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.formats.foreign import (
    SUFFIXES,
    Settings,
    Tensors,
    find_one,
    make_model,
    read_file,
    read_json,
    unwrapped,
)
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer

SYSTEM = "MiniMamba"
_TABLE, _LM_HEAD, _CLASSIFIER = (
    "embedding.token_embedding.weight",
    "lm_head.lm_head",
    "classifier.classifier",
)


def from_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """The model that MiniMamba's tensors and configuration (``to_dict()``) are; what they predict tells its head.

    A model that was made for embeddings alone gets a vocabulary of one id. CheckpointError names what does not fit.
    """
    tensors = unwrapped(tensors)
    old = "norm_f.weight" in tensors  # of the class without a backbone: always tied, no bias, a last RMS norm
    found, given = Tensors(_modern(tensors) if old else tensors, SYSTEM), Settings(config, SYSTEM)
    given.ignore("use_fast_path", "device", "dtype", "d_inner", "padded_vocab_size", "gradient_checkpointing")
    d_model, n_layer = given.count("d_model", 768), given.count("n_layer", 12)
    kind = "rms" if given.flag("rms_norm", True) else "layer"
    final = "rms" if old else kind
    eps = given.number("norm_epsilon", 1e-5)
    mixer = _mixer_options(given, d_model)
    head = _head(found, given, mixer["bias"] and not old)
    if old:
        head["tie"] = True
    weights = _embedding(found, d_model)
    rows = weights["embedding.tokens.weight"].shape[0]
    vocab_size, multiple = _vocabulary(given, rows, head["kind"])
    if head["kind"] == "lm":
        head["padded"] = rows != vocab_size
    for index in range(n_layer):
        theirs, ours = f"backbone.layers.{index}", f"blocks.{index}"
        weights |= _norm(found, f"{theirs}.norm", f"{ours}.norm1", d_model, kind)
        weights |= _mixer(found, f"{theirs}.mixer", f"{ours}.mixer", d_model, mixer)
    weights |= _norm(found, "backbone.norm", "final_norm", d_model, final)
    weights |= _head_weights(found, head, rows, d_model, weights["embedding.tokens.weight"])
    found.close()
    given.close()
    return make_model(
        {
            "d_model": d_model,
            "n_layer": n_layer,
            "pattern": "mamba",
            "vocab_size": vocab_size,
            "pad_vocab_size_multiple": multiple,
            "norm": {"kind": kind, "eps": eps},
            "final_norm": {"kind": final, "eps": eps},
            "mlp": "none",
            "head": head,
            "mamba": mixer,
        },
        weights,
        SYSTEM,
    )


def read(path: Path, config: Mapping[str, Any] | None = None) -> tuple[Model, Tokenizer | None]:
    """The model in a file of weights, or in a folder with one such file; it has no tokenizer of its own.

    Without ``config`` it is read from the one JSON file beside the weights (MiniMamba's ``save_to_json``).
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = find_one(path, SUFFIXES, "weights") if path.is_dir() else path
    tensors = read_file(file)
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{file} holds no state dict but a {type(tensors).__name__}")
    if config is None:
        config = read_json(find_one(folder, (".json",), "the configuration"))
    return from_state_dict(tensors, config), None


def _modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of ``MambaForCausalLM`` for those of the older class ``Mamba``."""
    names = {
        "embedding.weight": _TABLE,
        "norm_f.weight": "backbone.norm.weight",
        "lm_head.weight": f"{_LM_HEAD}.weight",
    }
    return {
        names.get(name, f"backbone.{name}" if name.startswith("layers.") else name): tensor
        for name, tensor in tensors.items()
    }


def _mixer_options(given: Settings, d_model: int) -> dict[str, Any]:
    # rounded down, at least one: what the original's "auto" means
    rank = max(1, d_model // 16) if given.get("dt_rank", "auto") == "auto" else given.count("dt_rank")
    return {
        "d_state": given.count("d_state", 16),
        "d_conv": given.count("d_conv", 4),
        "expand": given.number("expand", 2),
        "dt_rank": rank,
        "dt_min": given.number("dt_min", 0.001),
        "dt_max": given.number("dt_max", 0.1),
        "dt_init": given.get("dt_init", "random"),
        "dt_scale": given.number("dt_scale", 1.0),
        "dt_init_floor": given.number("dt_init_floor", 1e-4),
        "dt_bias_scale": 2.0,
        "gate": "identity",
        "bias": given.flag("bias", False),
        "conv_bias": given.flag("conv_bias", True),
    }


def _head(found: Tensors, given: Settings, bias: bool) -> dict[str, Any]:
    tie = given.flag("tie_embeddings", True)
    labels, pooling = given.count("num_labels", 2), given.get("pooling_strategy", "last")
    dropout = given.get("dropout", 0.1)
    if found.has(_CLASSIFIER):
        return {"kind": "classification", "num_labels": labels, "pooling": pooling, "dropout": dropout}
    return {"kind": "lm", "tie": tie, "bias": bias} if found.has(_LM_HEAD) else {"kind": "features"}


def _embedding(found: Tensors, d_model: int) -> dict[str, Tensor]:
    if _TABLE not in found:  # features of embeddings alone
        return {"embedding.tokens.weight": torch.zeros(1, d_model)}
    rows = found.shape(_TABLE)[0]
    return {"embedding.tokens.weight": found.take(_TABLE, rows, d_model)}


def _vocabulary(given: Settings, rows: int, head: str) -> tuple[int, int]:
    """The number of ids, and what the table's rows are rounded up to a multiple of."""
    multiple = given.count("pad_vocab_size_multiple", 8)
    size = given.count("vocab_size", rows)
    if head == "classification" or size == rows:
        return rows, 1  # a classifier's table has no rows that only pad
    if -(-size // multiple) * multiple != rows:
        raise CheckpointError(
            f"{SYSTEM}: {_TABLE} has {rows} rows, but vocab_size {size} rounded up to a multiple of "
            f"pad_vocab_size_multiple {multiple} is another number"
        )
    return size, multiple


def _norm(found: Tensors, theirs: str, ours: str, d_model: int, kind: str) -> dict[str, Tensor]:
    names = ("weight", "bias") if kind == "layer" else ("weight",)
    return {f"{ours}.{name}": found.take(f"{theirs}.{name}", d_model) for name in names}


def _mixer(
    found: Tensors, theirs: str, ours: str, d_model: int, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    inner, states, rank = int(options["expand"] * d_model), options["d_state"], options["dt_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "A_log": (inner, states),
        "D": (inner,),
        "in_proj.weight": (2 * inner, d_model),
        "conv1d.weight": (inner, 1, options["d_conv"]),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    if options["bias"]:
        shapes |= {"in_proj.bias": (2 * inner,), "out_proj.bias": (d_model,)}
    if options["conv_bias"]:
        shapes["conv1d.bias"] = (inner,)
    return {f"{ours}.{name}": found.take(f"{theirs}.{name}", *shape) for name, shape in shapes.items()}


def _head_weights(
    found: Tensors, head: Mapping[str, Any], rows: int, d_model: int, table: Tensor
) -> dict[str, Tensor]:
    if head["kind"] == "classification":
        labels = head["num_labels"]
        return {
            "head.classifier.weight": found.take(f"{_CLASSIFIER}.weight", labels, d_model),
            "head.classifier.bias": found.take(f"{_CLASSIFIER}.bias", labels),
        }
    if head["kind"] == "features":
        return {}
    weights = {}
    if not head["tie"]:
        weights["head.unembedding.weight"] = found.take(f"{_LM_HEAD}.weight", rows, d_model)
    elif f"{_LM_HEAD}.weight" in found and not torch.equal(
        found.take(f"{_LM_HEAD}.weight", rows, d_model), table
    ):
        raise CheckpointError(
            f"{SYSTEM}: {_LM_HEAD}.weight differs from {_TABLE}, to which the configuration ties it; "
            "set tie_embeddings to false"
        )
    if head["bias"]:
        weights["head.unembedding.bias"] = found.take(f"{_LM_HEAD}.bias", rows)
    return weights
