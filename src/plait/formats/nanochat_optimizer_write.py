"""The state of our optimizer as nanochat's optimizers save theirs: what ``nanochat_optimizer`` reads.

October 2025: the list of AdamW's and Muon's state dicts, of one process. July 2026: MuonAdamW's state dict of each of
any number of processes. The groups' settings (rates, averages, decays) are those of our groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plait.config.errors import CheckpointError
from plait.config.schema import ModelConfig
from plait.formats.nanochat_groups import Group, adamw_groups, count, is_july, muon_groups, refuse_hybrid
from plait.formats.nanochat_layout import SYSTEM, dealt, links
from plait.formats.nanochat_optimizer import AVERAGES, BUFFER, OURS, SECOND, STEP, WHOLE_BELOW, Values

StateDict = dict[str, Any]

# nanochat sets these in its code, where no option reaches them; a loaded state would replace them.
_NS_STEPS, _BETA2 = 5, 0.9


class Optimizing(Protocol):
    """What is asked of an optimizer (``plait.training.optimizers.Optimizer``)."""

    named: dict[str, nn.Parameter]
    parts: list[torch.optim.Optimizer]


def written(optimizer: Optimizing, config: ModelConfig, processes: int = 1) -> list[Any]:
    """What nanochat's processes save, one after another: July's state dicts, or October's one list.

    config: as ``nanochat_layout.model_config`` gives it. CheckpointError if nanochat's optimizers cannot be in such a
    state, or in October's form for several processes.
    """
    refuse_hybrid(config)
    entries, settings = read_parts(optimizer)
    found = to_theirs(entries, config)
    if not is_july(config):
        if processes != 1:
            raise CheckpointError(
                f"{SYSTEM} of October 2025 saves the state of one process; give processes=1"
            )
        return [[adamw_dict(found, settings, config), muon_dict(found, settings, config)]]
    return [_july_dict(found, settings, config, rank, processes) for rank in range(processes)]


def read_parts(optimizer: Optimizing) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """Of each parameter that has one the state, by what; and of each the settings of its group."""
    names = {id(parameter): name for name, parameter in optimizer.named.items()}
    entries, settings = {}, {}
    for part in optimizer.parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                settings[name] = {key: value for key, value in group.items() if key != "params"}
                settings[name]["muon"] = not isinstance(part, torch.optim.AdamW)
                if part.state[parameter]:
                    entries[name] = dict(part.state[parameter])
    return entries, settings


def to_theirs(entries: Mapping[str, Mapping[str, Tensor]], config: ModelConfig) -> Values:
    """The states under nanochat's names, joined and split as the weights are; of those that have one."""
    found: Values = {}
    theirs_of = {ours: theirs for theirs, ours in OURS.items()}
    for link in links(config):
        if not all(name in entries for name, _ in link.ours):
            continue
        for what in entries[link.ours[0][0]]:
            own = theirs_of.get(what, what)
            values = [entries[name][what].detach().float().cpu() for name, _ in link.ours]
            if what == STEP:
                parts = {name: values[0].clone() for name, _ in link.theirs}
            elif own == SECOND:
                parts = _evened(values[0], link.theirs)
            else:
                parts = dealt(values, link.theirs)
            for name, tensor in parts.items():
                found.setdefault(name, {})[own] = tensor
    return found


def _evened(values: Tensor, members: Group) -> dict[str, Tensor]:
    shapes = {name: (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1]) for name, shape in members}
    if values.numel() != sum(max(shape) for shape in shapes.values()):
        names = ", ".join(shapes)
        raise CheckpointError(f"{SYSTEM} evens out {names} one by one: train with muon.parts")
    return dealt([values], tuple(shapes.items()))


def adamw_dict(found: Values, settings: Mapping[str, Any], config: ModelConfig) -> StateDict:
    """October's AdamW, torch's own."""
    defaults = torch.optim.AdamW([torch.zeros(1)], fused=True).param_groups[0]
    entries, groups = [], []
    for members in adamw_groups(config):
        own = _settings(members, settings, config, muon=False)
        groups.append({**{k: v for k, v in defaults.items() if k != "params"}, **own})
        entries.append([_only(found.get(name, {}), (*AVERAGES, STEP), name) for name, _ in members])
    return _packed(entries, groups)


def muon_dict(found: Values, settings: Mapping[str, Any], config: ModelConfig) -> StateDict:
    """October's Muon, of one process."""
    entries, groups = [], []
    for members in muon_groups(config, False):
        own = _settings(members, settings, config, muon=True)
        groups.append(
            {**_only_keys(own, "lr", "momentum", "initial_lr"), "nesterov": True, "ns_steps": _NS_STEPS}
        )
        entries.append([_only(found.get(name, {}), (BUFFER,), name) for name, _ in members])
    return _packed(entries, groups)


def _july_dict(
    found: Values, settings: Mapping[str, Any], config: ModelConfig, rank: int, processes: int
) -> StateDict:
    entries: list[list[dict[str, Any]]] = []
    groups: list[dict[str, Any]] = []
    for members in adamw_groups(config):
        groups.append({"kind": "adamw", **_settings(members, settings, config, muon=False)})
        own = []
        for name, shape in members:
            entry: dict[str, Any] = dict(_only(found.get(name, {}), (*AVERAGES, STEP), name))
            if processes > 1 and count(shape) >= WHOLE_BELOW:
                entry |= {what: _rows(entry[what], name, rank, processes) for what in AVERAGES if entry}
            own.append(entry | ({STEP: int(entry[STEP])} if entry else {}))
        entries.append(own)
    for members in muon_groups(config, True):
        values = _settings(members, settings, config, muon=True)
        groups.append({"kind": "muon", **values, "ns_steps": _NS_STEPS, "beta2": _BETA2})
        each = -(-len(members) // processes)
        stacks = {}
        for what in (BUFFER, SECOND):
            tensors = [_only(found.get(name, {}), (BUFFER, SECOND), name).get(what) for name, _ in members]
            there = [tensor for tensor in tensors if tensor is not None]
            if len(there) == len(members):
                blank = torch.zeros_like(there[0])
                stacks[what] = torch.stack([*there, *[blank] * (each * processes - len(there))])
                stacks[what] = stacks[what][rank * each : (rank + 1) * each].clone()
        entries.append([stacks, *[{} for _ in members[1:]]])
    return _packed(entries, groups)


def _rows(tensor: Tensor, name: str, rank: int, processes: int) -> Tensor:
    if len(tensor) % processes:
        raise CheckpointError(
            f"{SYSTEM} cannot spread the {len(tensor)} rows of {name} over {processes} processes"
        )
    return tensor.chunk(processes)[rank].clone()


def _only(entry: Mapping[str, Tensor], wanted: Sequence[str], name: str) -> dict[str, Tensor]:
    """The state of one tensor; CheckpointError unless it is what nanochat keeps of it, or nothing yet."""
    if entry and set(entry) != set(wanted):
        raise CheckpointError(
            f"{SYSTEM} keeps {', '.join(wanted)} of {name}, and this optimizer {', '.join(entry)}: "
            "train with its recipe"
        )
    return dict(entry)


def _settings(
    members: Group, settings: Mapping[str, Any], config: ModelConfig, *, muon: bool
) -> dict[str, Any]:
    """What a group of nanochat's has: the settings of our parameters that its members are."""
    wanted = {name for name, _ in members}
    found: dict[str, Any] = {}
    for link in links(config):
        if not wanted & {name for name, _ in link.theirs}:
            continue
        for name, _ in link.ours:
            own = settings[name]
            if own["muon"] != muon:
                by = "Muon" if muon else "AdamW"
                raise CheckpointError(
                    f"{SYSTEM} trains {link.theirs[0][0]} by {by}, and this optimizer does not"
                )
            keys = ("momentum", "weight_decay") if muon else ("betas", "eps", "weight_decay")
            values = {"lr": own["lr"], "initial_lr": own["peak"], **_only_keys(own, *keys)}
            if found and found != values:
                raise CheckpointError(
                    f"{SYSTEM} trains {members[0][0]} and {name} at one rate: train with its recipe"
                )
            found = values
    return found


def _only_keys(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys}


def _packed(entries: Sequence[Sequence[Mapping[str, Any]]], groups: Sequence[Mapping[str, Any]]) -> StateDict:
    """A state dict: the tensors numbered through all groups."""
    state: dict[int, dict[str, Any]] = {}
    packed: list[dict[str, Any]] = []
    number = 0
    for own, settings in zip(entries, groups, strict=True):
        numbers = list(range(number, number + len(own)))
        state |= {n: dict(entry) for n, entry in zip(numbers, own, strict=True) if entry}
        packed.append({**settings, "params": numbers})
        number += len(own)
    return {"state": state, "param_groups": packed}
