"""Model Foundry's models: LSTM, GRU, RNN (one- or bidirectional), Mamba, GPT-2 and BERT.

Its checkpoint folders (checkpoint-{step}) hold model files, a tokenizer, metadata.json and a pickled training_state.pt,
which is not read. RNNs and Mamba lie as pytorch_model.bin with model_type.txt; GPT-2 and BERT are Hugging Face's
folders. Its right-padded RNNs give the output's bias at pads, ours zeros; everywhere else they agree.

Foundry had a stand-in for Mamba on machines without mamba-ssm. Its weights are refused: it never read the state
through C and kept a d_inner x d_inner map for the time steps, so no Mamba computes what it was trained to be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.config.originals.foundry import recognise
from plait.formats.foreign import Settings, Tensors, find_one, make_model, read_file, read_json, unwrapped
from plait.formats.huggingface import bert, gpt2
from plait.models.model import Model
from plait.tokenizers.base import MAIN_FILES, Tokenizer
from plait.tokenizers.load import load_tokenizer

SYSTEM = "Model Foundry"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
RECURRENT = {1: "rnn", 3: "gru", 4: "lstm"}  # by how many gates' rows a recurrent weight joins
_WRAPPER = "hf_model."  # what its class for Hugging Face's models puts before their names
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def from_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """The model that Foundry's tensors are, in evaluation mode; their names tell the architecture.

    ``config``: for GPT-2 and BERT Hugging Face's config.json; for the others what their constructor takes, of which
    the tensors tell all but ``dropout``; or a whole experiment. CheckpointError names what does not fit.
    """
    tensors = _bare(tensors)
    family, config = _family(tensors), _section(config)
    if family == "gpt2":
        return gpt2.from_state_dict(tensors, config)
    if family == "bert":
        return bert.from_state_dict(tensors, config)
    found, given = Tensors(tensors, SYSTEM), Settings(config, SYSTEM)
    given.ignore("architecture", "pad_token_id", "use_fast")
    model = _recurrent(found, given) if family == "rnn" else _mamba(found, given)
    return model


def read(path: Path, config: Mapping[str, Any] | None = None) -> tuple[Model, Tokenizer | None]:
    """The model and tokenizer of a checkpoint folder, of the last one in an output folder, or of a bare file.

    ``config`` is needed where the folder does not tell: for GPT-2 and BERT without a config.json.
    """
    path = Path(path)
    if path.is_file():
        return from_state_dict(_tensors(path), {} if config is None else config), None
    folder = _last_checkpoint(path)
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    tensors = _tensors(find_one(folder, (".safetensors", ".pt"), "weights") if file is None else file)
    if config is None and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    has_tokenizer = any((folder / name).is_file() for name in MAIN_FILES)
    model = from_state_dict(tensors, {} if config is None else config)
    return model, load_tokenizer(folder) if has_tokenizer else None


def _tensors(file: Path) -> Mapping[str, Tensor]:
    tensors = read_file(file)
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{file} holds no state dict but a {type(tensors).__name__}")
    return tensors


def _last_checkpoint(folder: Path) -> Path:
    """The folder itself if it holds weights, else the one of the latest step below it."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no {folder}")
    if any((folder / name).is_file() for name in WEIGHTS):
        return folder
    steps = {int(m[1]): p for p in folder.iterdir() if p.is_dir() and (m := _CHECKPOINT.fullmatch(p.name))}
    return steps[max(steps)] if steps else folder


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = unwrapped(tensors)
    if tensors and all(name.startswith(_WRAPPER) for name in tensors):
        tensors = {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}
    return tensors


def _family(tensors: Mapping[str, Tensor]) -> str:
    marks = (
        ("rnn", r"rnn\.weight_"),
        ("bert", r"bert\."),
        ("gpt2", r"(transformer\.)?h\.\d+\."),
        ("mamba", r"layers\.\d+\.(mixer\.)?A_log"),
    )
    for family, mark in marks:
        if any(re.match(mark, name) for name in tensors):
            return family
    raise CheckpointError(
        f"{SYSTEM}: the tensors ({', '.join(list(tensors)[:3]) or 'none'} ...) are of none of its architectures: "
        "lstm, gru, rnn, mamba, gpt2, bert"
    )


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the constructor takes, of a whole experiment's config or as it is."""
    if not recognise(config):
        return config
    model = config["model"]
    section = "rnn" if model["architecture"] in RECURRENT.values() else str(model["architecture"])
    if not isinstance(model.get(section), Mapping):
        raise CheckpointError(
            f"{SYSTEM}: an experiment's config describes an rnn or mamba; for {model['architecture']} give the "
            "config.json that Hugging Face's models have"
        )
    return dict(model[section])


def _recurrent(found: Tensors, given: Settings) -> Model:
    rows, width = found.shape("embedding.weight")
    hidden = found.shape("rnn.weight_hh_l0")[1]
    kind = RECURRENT.get(found.shape("rnn.weight_hh_l0")[0] // hidden, "")
    n_layer = 0
    while f"rnn.weight_ih_l{n_layer}" in found:
        n_layer += 1
    two_way = "rnn.weight_ih_l0_reverse" in found
    told = {
        "vocab_size": rows,
        "embedding_size": width,
        "hidden_size": hidden,
        "num_layers": n_layer,
        "bidirectional": two_way,
        "rnn_type": kind,
    }
    _agree(given, told)
    dropout = given.get("dropout", 0.0)
    given.close()
    gates = next((gates for gates, name in RECURRENT.items() if name == kind), 0) * hidden
    d_out = hidden * (2 if two_way else 1)
    weights = {"embedding.tokens.weight": found.take("embedding.weight", rows, width)}
    for index in range(n_layer):
        d_in = width if index == 0 else d_out
        shapes = {
            "weight_ih": (gates, d_in),
            "weight_hh": (gates, hidden),
            "bias_ih": (gates,),
            "bias_hh": (gates,),
        }
        for direction in ("", "_reverse") if two_way else ("",):
            for name, shape in shapes.items():
                ours = f"blocks.{index}.mixer.rnn.{name}_l0{direction}"
                weights[ours] = found.take(f"rnn.{name}_l{index}{direction}", *shape)
    weights["head.unembedding.weight"] = found.take("output_projection.weight", rows, d_out)
    weights["head.unembedding.bias"] = found.take("output_projection.bias", rows)
    found.close()
    values = {
        "d_model": d_out,
        "n_layer": n_layer,
        "pattern": kind,
        "vocab_size": rows,
        "causal": not two_way,
        "norm": "none",
        "residual": "none",
        "mlp": "none",
        "dropout": dropout,
        "embedding": {"width": width},
        "final_norm": "none",
        "head": {"kind": "masked_lm" if two_way else "lm", "tie": False, "bias": True},
        kind: {"d_hidden": hidden, "bidirectional": two_way},
    }
    return make_model(values, weights, SYSTEM)


def _mamba(found: Tensors, given: Settings) -> Model:
    rows, d_model = found.shape("embedding.weight")
    wrapped = "layers.0.mixer.A_log" in found  # the class with a norm before each mixer; the plan's had none
    inside = "mixer." if wrapped else ""
    final = "norm_f" if wrapped else "norm"
    first = f"layers.0.{inside}"
    inner, states = found.shape(first + "A_log")
    rank = found.shape(first + "dt_proj.weight")[1]
    if rank == inner and found.shape(first + "x_proj.weight")[0] == 2 * states:
        raise CheckpointError(
            f"{SYSTEM}: these are weights of its stand-in for machines without mamba-ssm ({first}dt_proj.weight is "
            f"{inner} x {inner}, {first}x_proj.weight gives no C), which is not Mamba: no Mamba computes what they "
            "were trained for. Train the experiment anew: plait train CONFIG.yaml"
        )
    n_layer = 0
    while f"layers.{n_layer}.{inside}A_log" in found:
        n_layer += 1
    taps, expand = found.shape(first + "conv1d.weight")[2], inner / d_model
    told = {
        "vocab_size": rows,
        "d_model": d_model,
        "n_layers": n_layer,
        "d_state": states,
        "d_conv": taps,
        "expand": int(expand) if expand.is_integer() else expand,
    }
    _agree(given, told)
    dropout = given.get("dropout", 0.0)
    given.close()
    shapes: dict[str, tuple[int, ...]] = {
        "A_log": (inner, states),
        "D": (inner,),
        "in_proj.weight": (2 * inner, d_model),
        "conv1d.weight": (inner, 1, taps),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    weights = {"embedding.tokens.weight": found.take("embedding.weight", rows, d_model)}
    for index in range(n_layer):
        for name, shape in shapes.items():
            theirs = f"layers.{index}.{inside}{name}"
            weights[f"blocks.{index}.mixer.{name}"] = found.take(theirs, *shape)
        if wrapped:
            weights |= _norm(found, f"layers.{index}.norm", f"blocks.{index}.norm1", d_model)
    weights |= _norm(found, final, "final_norm", d_model)
    tied = _take_tied(found, "lm_head.weight", weights["embedding.tokens.weight"])
    weights |= tied
    found.close()
    values = {
        "d_model": d_model,
        "n_layer": n_layer,
        "pattern": "mamba",
        "vocab_size": rows,
        "norm": {"kind": "layer" if wrapped else "none"},
        "final_norm": {"kind": "layer"},
        "mlp": "none",
        "dropout": dropout,
        "head": {"kind": "lm", "tie": not tied},
        "mamba": {"d_state": states, "d_conv": taps, "expand": told["expand"], "dt_rank": rank},
    }
    return make_model(values, weights, SYSTEM)


def _norm(found: Tensors, theirs: str, ours: str, width: int) -> dict[str, Tensor]:
    return {f"{ours}.{name}": found.take(f"{theirs}.{name}", width) for name in ("weight", "bias")}


def _take_tied(found: Tensors, name: str, table: Tensor) -> dict[str, Tensor]:
    """Nothing if the output is the embedding's table; else it, as in files of a model that was resized untied."""
    if name not in found:
        return {}
    weight = found.take(name, *table.shape)
    return {} if torch.equal(weight, table) else {"head.unembedding.weight": weight}


def _agree(given: Settings, told: Mapping[str, Any]) -> None:
    """CheckpointError for a setting that is given and is not what the tensors tell."""
    for name, value in told.items():
        if name in given and given.get(name) != value:
            raise CheckpointError(
                f"{SYSTEM}: the setting {name!r} is {given.get(name)!r}, but the tensors are of {value!r}"
            )
        given.ignore(name)
