"""A checkpoint of nanochat's with its optimizers' state, as a run that goes on from there in Plait.

What the files say is taken over: the rates, averages and decays of each group from the optimizers' state, the length
of the run and its schedule from ``user_config``, batch and length of rows from the meta, the count of steps. The rest
is that of the recipes nanochat and nanochat2026. The text goes on where as many rows have been read as nanochat's steps
took; nanochat's own place in its files (file, row group) means nothing in another order of reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.config.errors import CheckpointError, ConfigError
from plait.config.load import load_config
from plait.config.recipes import read_recipe
from plait.config.schema import Config, ModelConfig
from plait.formats import nanochat_files as files
from plait.formats.foreign import read_json
from plait.formats.nanochat_groups import count, is_july
from plait.formats.nanochat_layout import SYSTEM, links, model_config
from plait.formats.nanochat_optimizer import OptimizerState, read_optimizer

RECIPES = {False: "nanochat", True: "nanochat2026"}  # whether it is July's model
_HORIZONS = ("steps", "epochs", "tokens_per_parameter", "flops")
_RATIOS = {False: 20.0, True: 12.0}  # tokens a parameter, where user_config says nothing
_CONVERSATIONS = ("mid_checkpoints", "chatsft_checkpoints")
# The parameters of ours that are nanochat's groups of AdamW, by the first tensor of each.
_PATTERNS = {
    "lm_head.weight": ("head.unembedding.weight",),
    "transformer.wte.weight": ("embedding.tokens.weight",),
    "resid_lambdas": ("*.input_mix.scale",),
    "x0_lambdas": ("*.input_mix.share",),
    "smear_gate.weight": ("smear.*", "backout.*"),
}
_TABLES = "*.value_embedding.table.weight"


@dataclass(frozen=True)
class ForeignRun:
    """What it takes to go on with another system's run: a checkpoint's contents beside the model."""

    config: Config
    optimizer: dict[str, Tensor]  # "<what>.<parameter>", as training.optimizers.Optimizer.state names them
    step: int
    sample: int  # the next global row
    tokens: int
    elapsed: float  # seconds


def read_run(path: Path, gpt: Mapping[str, Any] | None = None) -> ForeignRun | None:
    """The run of the checkpoint that a path means; None where no optimizer's file lies beside the weights.

    gpt: the GPTConfig, if it does not lie there. CheckpointError names the file and what is wrong in it.
    """
    weights = files.find_weights(path)
    step = files.step_of(weights)
    found = [] if step is None else files.optimizer_files(weights.parent, step)
    if step is None or not found:
        return None
    meta = read_json(files.meta_file(weights.parent, step))
    model = ModelConfig.model_validate(model_config(meta if gpt is None else gpt))
    state = read_optimizer(found, model)
    chat = weights.absolute().parent.parent.name in _CONVERSATIONS
    try:
        config = run_config(meta, model, state, step, chat=chat)
    except ConfigError as error:
        raise CheckpointError(f"{files.meta_file(weights.parent, step)}: {error}") from None
    rows = config.training.batch_tokens // config.data.sequence_length
    loop = meta.get("loop_state")
    return ForeignRun(
        config=config,
        optimizer=state.tensors,
        step=step,
        sample=step * rows,
        tokens=step * rows * config.data.sequence_length,
        elapsed=_number(loop if isinstance(loop, Mapping) else {}, "total_training_time", 0.0),
    )


def run_config(
    meta: Mapping[str, Any], model: ModelConfig, state: OptimizerState, step: int, *, chat: bool = False
) -> Config:
    """The run that a meta and an optimizer's state describe, after ``step`` steps; ConfigError if it is none.

    chat: it learnt conversations.
    """
    july = is_july(model)
    values = read_recipe(RECIPES[july])
    user = meta.get("user_config")
    user = user if isinstance(user, Mapping) else {}
    training: dict[str, Any] = values["training"]
    for name in _HORIZONS:
        training.pop(name, None)
    gpt = meta["model_config"] if isinstance(meta.get("model_config"), Mapping) else {}
    length = int(_first("max_seq_len", (meta, user), _number(gpt, "sequence_len", 2048)))
    batch = int(_first("total_batch_size", (meta, user), training["batch_tokens"]))
    rows = int(_first("device_batch_size", (meta, user), training["micro_batch_tokens"] // length))
    steps = _steps(user, model, batch)
    training |= {
        "batch_tokens": batch,
        "micro_batch_tokens": min(batch, max(1, rows) * length),
        "objective": "chat" if chat else "causal_lm",
        **_schedule(user, training, july),
        **_rates(state, training),
    }
    training |= {"flops": _number(user, "target_flops", -1.0)} if steps is None else {"steps": steps}
    if july and steps is not None and "num_iterations" in user:
        training |= _decay(state, step, steps)
    values["experiment_name"] = f"d{len(model.layers())}"
    values["data"] = (
        {"sequence_length": length}
        if chat
        else values["data"] | {"sequence_length": length, "shuffle": False}
    )
    del values["model"]
    return load_config(values).replace(model=model)


def _steps(user: Mapping[str, Any], model: ModelConfig, batch: int) -> int | None:
    """The steps of nanochat's run; None if it goes by operations, which it counts in its own way."""
    july = is_july(model)
    given = int(_number(user, "num_iterations", -1))
    if given > 0:
        return given
    if _number(user, "target_flops", -1.0) > 0:
        return None
    ratio = _number(user, "target_param_data_ratio", _RATIOS[july])
    # October counts all parameters, July those of the blocks and of the output.
    counted = [
        count(shape)
        for link in links(model)
        for name, shape in link.theirs
        if not july or name.startswith(("transformer.h.", "lm_head."))
    ]
    return max(1, int(ratio * sum(counted)) // batch)


def _schedule(user: Mapping[str, Any], recipe: Mapping[str, Any], july: bool) -> dict[str, Any]:
    warmup = "warmup_steps" if july else "warmup_ratio"
    down = _number(user, "warmdown_ratio", recipe["decay_fraction"])
    found: dict[str, Any] = {
        "warmup": _number(user, warmup, recipe["warmup"]),
        "schedule": "wsd" if down else "constant",
        "decay_fraction": down or 1.0,
        "min_lr_ratio": _number(user, "final_lr_frac", recipe["min_lr_ratio"]),
    }
    if not july:
        found["grad_clip"] = _number(user, "grad_clip", recipe["grad_clip"]) or None
    return found


def _rates(state: OptimizerState, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Peak rates and what AdamW's groups have of their own, as the optimizers' state has them."""
    groups = dict(recipe.get("groups", {}))
    found: dict[str, Any] = {"embedding_lr_width": None}
    for first, own in state.settings.items():
        peak = _number(own, "initial_lr", None)
        if "betas" not in own:
            found["muon_lr"] = peak
            continue
        mine = {
            "lr": peak,
            "betas": list(own["betas"]),
            "eps": own["eps"],
            "weight_decay": own["weight_decay"],
        }
        for pattern in _PATTERNS.get(first, (_TABLES,)):
            groups[pattern] = {**groups.get(pattern, {}), **mine}
    return {**found, "groups": groups}


def _decay(state: OptimizerState, step: int, steps: int) -> dict[str, Any]:
    """July's decay of matrices at the beginning: it has gone down along half a cosine until the last step."""
    left = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    last = [own["weight_decay"] for own in state.settings.values() if "betas" not in own]
    return {"weight_decay": last[0] / left} if step <= steps and left > 0 else {}


def _first(name: str, places: tuple[Mapping[str, Any], ...], default: float) -> float:
    given = next((place for place in places if place.get(name) not in (None, -1)), {})
    return _number(given, name, default)


def _number(values: Mapping[str, Any], name: str, default: float | None) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{SYSTEM}: {name} is {value!r}, not a number")
    return value
