"""BitByte's models: BitByteLM and MambaMLM, or blocks of both, from a checkpoint or a state dict.

What changes their numbers is in the converted model's options: ternary maps whose gradient is clipped, one scale for
a whole ``in_proj`` or ``gate_up`` but one each for queries, keys and values, which are joined here; ternary maps to
time steps (full rank), B and C (``projections: separate``); activations rounded to 8 bits, or not. Rounded
activations pass gradients here; in the original they stop them.
"""

from __future__ import annotations

import argparse
import re
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
from plait.tokenizers.bytes import N_BYTES, BytesTokenizer

SYSTEM = "BitByte"
_EPS = 1e-6  # of its RMS norms; its LayerNorm has torch's own
_LAYER_EPS = 1e-5
# What its trainer's flags say about the run, and nothing about the model.
_RUN_FLAGS = (
    *(
        "data",
        "out",
        "steps",
        "log_every",
        "save_every",
        "ddp",
        "use_sdpa",
        "no_ckpt",
        "lr",
        "warmup_frac",
        "wd",
    ),
    *("grad_clip", "batch_size", "grad_accum", "seq_len", "seq_len_cap", "resume", "no_opt_state"),
)
_STRANGERS = ("diffusion", "deq", "loglinear", "log_linear")  # variants that are other models


def from_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """The model that BitByte's tensors and settings are, by the names of its constructors or of its flags.

    Each block's tensors tell its kind. ``act_quant`` (default true) or ``no_act_quant`` says whether activations are
    rounded. CheckpointError names what does not fit.
    """
    found, given = Tensors(tensors, SYSTEM), Settings(config, SYSTEM)
    d_model, d_ff = given.count("d_model"), given.count("d_ff")
    vocab_size, n_layer = given.count("vocab_size", N_BYTES), given.count("n_layer")
    kinds = [_kind(found, index) for index in range(n_layer)]
    used: dict[str, dict[str, Any]] = {}
    if "attention" in kinds:
        used["attention"] = _attention(given, d_model)
    if "mamba" in kinds:
        used["mamba"] = _mamba(given)
    # its flags are the same for every model
    given.ignore(*_RUN_FLAGS, "n_head", "n_kv_head", "rope_base", "d_state", "d_conv", "expand")
    linear = {
        "kind": "ternary",
        "activations": "int8" if _rounds_activations(given) else "none",
        "ste": "clipped",
        "scale": "matrix",
    }
    weights = {"embedding.tokens.weight": found.take("tok_emb.weight", vocab_size, d_model)}
    for index, kind in enumerate(kinds):
        theirs, ours = f"blocks.{index}", f"blocks.{index}"
        mixer = _take_attention if kind == "attention" else _take_mamba
        weights |= mixer(found, theirs, f"{ours}.mixer", d_model, used[kind])
        weights |= _take_mlp(found, f"{theirs}.mlp", f"{ours}.mlp", d_model, d_ff)
        for theirs_norm, ours_norm in (("n1", "norm1"), ("n2", "norm2")):
            weights[f"{ours}.{ours_norm}.weight"] = found.take(f"{theirs}.{theirs_norm}.weight", d_model)
    centred = "norm_f.bias" in found
    for name in ("weight", "bias") if centred else ("weight",):
        weights[f"final_norm.{name}"] = found.take(f"norm_f.{name}", d_model)
    weights |= _take_head(found, vocab_size, d_model, weights["embedding.tokens.weight"])
    found.close()
    given.close()
    if "attention" in used:  # its maps of queries, keys and values are joined here, under scales of their own
        used["attention"]["linear"] = {**linear, "scale": "part"}
    return make_model(
        {
            "d_model": d_model,
            "n_layer": n_layer,
            "pattern": kinds,
            "vocab_size": vocab_size,
            "norm": {"kind": "rms", "eps": _EPS},
            "final_norm": {"kind": "layer", "eps": _LAYER_EPS} if centred else {"kind": "rms", "eps": _EPS},
            "linear": linear,
            "mlp": {"kind": "swiglu", "width": d_ff, "linear": linear},
            "head": {"kind": "lm", "tie": "head.unembedding.weight" not in weights},
            **used,
        },
        weights,
        SYSTEM,
    )


def read(path: Path, config: Mapping[str, Any] | None = None) -> tuple[Model, Tokenizer | None]:
    """The model of a checkpoint ({step, model, args, ...}), of a bare state dict, or of a folder with either.

    Of several checkpoints in a folder it is the one of the latest step. ``config`` stands for the settings that a
    checkpoint holds; a bare state dict needs it, or the one JSON file beside it. The tokenizer is the bytes.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = _latest(path) if path.is_dir() else path
    held = read_file(file)
    if not isinstance(held, Mapping):
        raise CheckpointError(
            f"{file} holds neither a checkpoint nor a state dict but a {type(held).__name__}"
        )
    tensors: Mapping[str, Tensor] = held
    if isinstance(held.get("model"), Mapping):
        tensors = held["model"]
        _refuse_strangers(held)
        if config is None:
            config = _flags(held.get("args"), file)
    elif config is None:
        config = read_json(find_one(folder, (".json",), "the settings"))
    config = dict(config)
    table = unwrapped(tensors).get("tok_emb.weight")
    if "vocab_size" not in config and isinstance(table, Tensor):
        config["vocab_size"] = table.shape[0]  # no flag tells it
    model = from_state_dict(tensors, config)
    return model, BytesTokenizer(()) if model.vocab_size >= N_BYTES else None


def _latest(folder: Path) -> Path:
    files = [p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()]
    steps = {p: int(match[1]) for p in files if (match := re.search(r"(\d+)\D*$", p.stem))}
    if len(files) > 1 and len(steps) == len(files) and len(set(steps.values())) == len(files):
        return max(files, key=lambda p: steps[p])
    return find_one(folder, SUFFIXES, "weights")


def _flags(args: Any, file: Path) -> dict[str, Any]:
    """A checkpoint's flags; those that are off say nothing."""
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, Mapping):
        raise CheckpointError(f"{file} holds no settings of its run (args); give them as the config")
    return {str(name): value for name, value in args.items() if value is not None and value is not False}


def _refuse_strangers(checkpoint: Mapping[str, Any]) -> None:
    for name in ("variant", "model_family"):
        value = str(checkpoint.get(name) or "").lower().replace("-", "_")
        for word in _STRANGERS:
            if word in value:
                raise CheckpointError(
                    f"{SYSTEM}: the checkpoint's {name} is {checkpoint[name]!r}; only BitByteLM and MambaMLM are read"
                )


def _rounds_activations(given: Settings) -> bool:
    off = given.flag("no_act_quant", False)
    return given.flag("act_quant", not off)


def _kind(found: Tensors, index: int) -> str:
    kinds = {"attn": "attention", "ssm": "mamba"}
    there = [kind for name, kind in kinds.items() if found.has(f"blocks.{index}.{name}.")]
    if len(there) != 1:
        raise CheckpointError(
            f"{SYSTEM}: block {index} should hold tensors of either blocks.{index}.attn or blocks.{index}.ssm"
        )
    return there[0]


def _attention(given: Settings, d_model: int) -> dict[str, Any]:
    n_head = given.count("n_head")
    if d_model % n_head:
        raise CheckpointError(f"{SYSTEM}: d_model {d_model} is not a multiple of n_head {n_head}")
    n_kv_head = given.get("n_kv_head")
    return {
        "n_head": n_head,
        "n_kv_head": n_head if n_kv_head is None else given.count("n_kv_head"),
        "rope_base": given.number("rope_base", 10000.0),
    }


def _mamba(given: Settings) -> dict[str, Any]:
    return {
        "d_state": given.count("d_state", 16),
        "d_conv": given.count("d_conv", 4),
        "expand": given.count("expand", 2),
        "dt_rank": "full",
        "projections": "separate",
    }


def _take_attention(
    found: Tensors, theirs: str, ours: str, d_model: int, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    headdim = d_model // options["n_head"]
    width, kv_width = options["n_head"] * headdim, options["n_kv_head"] * headdim
    widths = {"q": width, "k": kv_width, "v": kv_width}
    joined = [found.take(f"{theirs}.attn.{n}_proj.weight", rows, d_model) for n, rows in widths.items()]
    return {
        f"{ours}.in_proj.weight": torch.cat(joined),
        f"{ours}.out_proj.weight": found.take(f"{theirs}.attn.o_proj.weight", d_model, width),
    }


def _take_mamba(
    found: Tensors, theirs: str, ours: str, d_model: int, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    inner, states = options["expand"] * d_model, options["d_state"]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "A_log": ("A_log", (inner, states)),
        "D": ("D", (inner,)),
        "conv1d.weight": ("conv1d.weight", (inner, 1, options["d_conv"])),
        "conv1d.bias": ("conv1d.bias", (inner,)),
        "in_proj.weight": ("in_proj.weight", (2 * inner, d_model)),
        "delta_proj.weight": ("dt_proj.weight", (inner, inner)),
        "delta_proj.bias": ("dt_bias", (inner,)),
        "B_proj.weight": ("B_proj.weight", (states, inner)),
        "C_proj.weight": ("C_proj.weight", (states, inner)),
        "out_proj.weight": ("out_proj.weight", (d_model, inner)),
    }
    return {
        f"{ours}.{name}": found.take(f"{theirs}.ssm.{key}", *shape) for key, (name, shape) in shapes.items()
    }


def _take_mlp(found: Tensors, theirs: str, ours: str, d_model: int, d_ff: int) -> dict[str, Tensor]:
    gate, value = found.take(f"{theirs}.gate_up.weight", 2 * d_ff, d_model).chunk(2)
    return {
        f"{ours}.fc1.weight": torch.cat([value, gate]),  # ours has the gate last
        f"{ours}.fc2.weight": found.take(f"{theirs}.down.weight", d_model, d_ff),
    }


def _take_head(found: Tensors, vocab_size: int, d_model: int, table: Tensor) -> dict[str, Tensor]:
    """Nothing if the output is tied to the embedding, as in all of its models, or is not there at all."""
    if "lm_head.weight" not in found:
        return {}
    weight = found.take("lm_head.weight", vocab_size, d_model)
    return {} if torch.equal(weight, table) else {"head.unembedding.weight": weight}
