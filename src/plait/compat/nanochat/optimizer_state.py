"""The states of a GPT's optimizers as nanochat's [AdamW, Muon] save theirs, so that its files hold what its files hold.

Only for attention alone: nanochat's Muon takes matrices, and cannot train the other blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from plait.config.schema import ModelConfig
from plait.formats.nanochat_optimizer import (
    AVERAGES,
    BUFFER,
    STEP,
    Share,
    Values,
    adamw_values,
    by_file,
    check_groups,
    muon_values,
    to_ours,
)
from plait.formats.nanochat_optimizer_write import adamw_dict, muon_dict, read_parts, to_theirs
from plait.training.optimizers import Optimizer

StateDict = dict[str, Any]
_KEPT = (*AVERAGES, STEP, BUFFER)
_TAKEN = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")  # of a group, where it has them


def speak_nanochat(optimizer: Optimizer, config: ModelConfig) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon]; ``state_dict`` and ``load_state_dict`` of both give and take nanochat's, of October 2025.

    CheckpointError from the latter names the tensor that does not fit.
    """
    adamw = next(part for part in optimizer.parts if isinstance(part, torch.optim.AdamW))
    muon = next(part for part in optimizer.parts if part is not adamw)
    forms: list[tuple[torch.optim.Optimizer, _Make, _Check, _Read]] = [
        (adamw, adamw_dict, check_groups, adamw_values),
        (muon, muon_dict, by_file, muon_values),
    ]
    for part, make, check, read in forms:
        part.register_state_dict_post_hook(_giver(optimizer, config, make))
        part.register_load_state_dict_pre_hook(_taker(optimizer, config, check, read))
    return [adamw, muon]


_Make = Callable[[Values, dict[str, Any], ModelConfig], StateDict]
_Check = Callable[[Share, ModelConfig], object]
_Read = Callable[[list[Share], ModelConfig], Values]


def _giver(
    optimizer: Optimizer, config: ModelConfig, make: _Make
) -> Callable[[torch.optim.Optimizer, StateDict], StateDict]:
    def give(part: torch.optim.Optimizer, own: StateDict) -> StateDict:
        entries, settings = read_parts(optimizer)
        return make(to_theirs(entries, config), settings, config)

    return give


def _taker(
    optimizer: Optimizer, config: ModelConfig, check: _Check, read: _Read
) -> Callable[[torch.optim.Optimizer, StateDict], StateDict]:
    names = {id(parameter): name for name, parameter in optimizer.named.items()}

    def take(part: torch.optim.Optimizer, given: StateDict) -> StateDict:
        share = Share("the state dict", given)
        check(share, config)  # also where nothing is kept yet
        found = to_ours(read([share], config), config) if share.state else {}
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for group in part.param_groups:
            numbers: list[int] = []
            for parameter in group["params"]:
                number = len(numbers) + sum(len(other["params"]) for other in groups)
                name = names[id(parameter)]
                own = {what: found[f"{what}.{name}"] for what in _KEPT if f"{what}.{name}" in found}
                if own:
                    state[number] = own
                numbers.append(number)
            groups.append({**group, "params": numbers, **_settings(share, group, names)})
        return {"state": state, "param_groups": groups}

    return take


def _settings(share: Share, group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """What the file says of this group: AdamW's groups are the output and the embedding, Muon's are all alike."""
    first = names[id(group["params"][0])]
    theirs = share.groups[1 if first.startswith("embedding.") else 0]
    taken = {key: theirs[key] for key in _TAKEN if key in theirs and key in group}
    # What the schedules of Plait's trainer start from, and what is saved as initial_lr.
    peaks = {"peak": theirs["initial_lr"]} if "initial_lr" in theirs else {}
    return {**taken, **peaks, "peak_decay": taken.get("weight_decay", group["peak_decay"])}
