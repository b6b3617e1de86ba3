"""The state of nanochat's optimizers, read from its files, under the names of our parameters.

    October 2025          optim_<step>.pt           [AdamW's state dict, Muon's]
    November 2025         optim_<step>_rank<r>.pt   the same, of each process its share
    July 2026             optim_<step>_rank<r>.pt   MuonAdamW's state dict, of each process its share

A share of AdamW's averages is a slice of the rows; in July tensors below 1024 values are whole on every process. A
share of Muon's state is that of some matrices: in November of every n-th one of a group, in July of a run of
ceil(K / n), stacked under the group's first. In October several processes wrote the first one's share alone, which is
refused. Ours is ``<what>.<name>``, what being exp_avg, exp_avg_sq, step, momentum_buffer or second_moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.config.schema import ModelConfig
from plait.formats.foreign import read_file
from plait.formats.nanochat_groups import Group, adamw_groups, count, is_july, muon_groups, refuse_hybrid
from plait.formats.nanochat_layout import dealt, links

AVERAGES = ("exp_avg", "exp_avg_sq")
BUFFER, SECOND, STEP = "momentum_buffer", "second_momentum_buffer", "step"
OURS = {SECOND: "second_moment"}  # what of theirs is called otherwise here
WHOLE_BELOW = 1024  # values of a tensor whose averages July keeps whole on every process

Values = dict[str, dict[str, Tensor]]  # nanochat's name of a parameter -> what -> its state


@dataclass(frozen=True)
class OptimizerState:
    """What the files of one step hold."""

    tensors: dict[str, Tensor]  # by our names, in float32
    settings: dict[str, dict[str, Any]]  # of each of nanochat's groups, by the name of its first tensor


class Share:
    """One optimizer's state dict of one process."""

    def __init__(self, source: str, data: Any) -> None:
        """source: what errors call it. CheckpointError unless data has the form of a state dict."""
        self.source = source
        if not isinstance(data, Mapping) or not {"state", "param_groups"} <= data.keys():
            raise CheckpointError(f"{source} is no optimizer's state: it has no state and param_groups")
        self.state: Mapping[Any, Any] = data["state"]
        self.groups: list[dict[str, Any]] = [dict(group) for group in data["param_groups"]]

    def numbers(self, groups: Sequence[Group]) -> list[list[int]]:
        """Under which numbers the members of these groups lie; CheckpointError unless the file has such groups."""
        found = [list(group["params"]) for group in self.groups]
        if [len(numbers) for numbers in found] != [len(members) for members in groups]:
            sizes = " + ".join(str(len(numbers)) for numbers in found)
            wanted = " + ".join(str(len(members)) for members in groups)
            raise CheckpointError(
                f"{self.source} is of another model: its groups have {sizes} tensors, this model's {wanted}"
            )
        return found

    def holds(self, number: int) -> bool:
        """Whether there is a state under this number."""
        return bool(self.state.get(number))

    def shape(self, number: int, what: str, name: str) -> tuple[int, ...]:
        """The shape of what is there; CheckpointError, naming the parameter, if it is no tensor of numbers."""
        return tuple(self._get(number, what, name).shape)

    def take(self, number: int, what: str, name: str, *shape: int) -> Tensor:
        """What is there, in float32, which must have this shape."""
        tensor = self._get(number, what, name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.source}: {what} of {name} has the shape {tuple(tensor.shape)}, not {shape}"
            )
        return tensor.float()

    def step(self, number: int, name: str) -> Tensor:
        """The count of AdamW's steps, as a float32 scalar."""
        value = self._entry(number, STEP, name)
        steps = float(value) if isinstance(value, int | float) else value.item() if _one(value) else -1.0
        if not steps >= 0:
            raise CheckpointError(f"{self.source}: {STEP} of {name} is {value!r}, no number of steps")
        return torch.tensor(steps, dtype=torch.float32)

    def _entry(self, number: int, what: str, name: str) -> Any:
        entry = self.state.get(number, {})
        if what not in entry:
            raise CheckpointError(f"{self.source}: {what} of {name} is missing")
        return entry[what]

    def _get(self, number: int, what: str, name: str) -> Tensor:
        value = self._entry(number, what, name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{self.source}: {what} of {name} is no tensor of floating-point numbers")
        return value


def read_optimizer(files: Sequence[Path], config: ModelConfig) -> OptimizerState:
    """The state in a step's files, those of several processes by rank (``nanochat_files.optimizer_files``).

    config: the model's, as ``nanochat_layout.model_config`` gives it. CheckpointError names file and tensor.
    """
    refuse_hybrid(config)
    contents = [read_file(file) for file in files]
    names = [str(file) for file in files]
    if is_july(config):
        shares = [Share(name, data) for name, data in zip(names, contents, strict=True)]
        return _result(
            _july(shares, config), [shares], [adamw_groups(config) + muon_groups(config, True)], config
        )
    for name, data in zip(names, contents, strict=True):
        if not isinstance(data, list) or len(data) != 2:
            raise CheckpointError(f"{name} is not the list of AdamW's and Muon's states that this model has")
    adamw, muon = ([Share(n, data[i]) for n, data in zip(names, contents, strict=True)] for i in (0, 1))
    groups = [adamw_groups(config), by_file(muon[0], config)]
    found = adamw_values(adamw, config) | muon_values(muon, config)
    return _result(found, [adamw, muon], groups, config)


def _result(
    found: Values,
    optimizers: Sequence[Sequence[Share]],
    groups: Sequence[Sequence[Group]],
    config: ModelConfig,
) -> OptimizerState:
    settings = {
        members[0][0]: {key: value for key, value in theirs.items() if key != "params"}
        for shares, own in zip(optimizers, groups, strict=True)
        for members, theirs in zip(own, shares[0].groups, strict=True)
    }
    return OptimizerState(to_ours(found, config), settings)


def adamw_values(shares: Sequence[Share], config: ModelConfig) -> Values:
    """October's AdamW: of several processes each has a slice of every tensor's rows."""
    groups = adamw_groups(config)
    numbers = _numbers(shares, groups)
    _check_processes(shares, numbers[0][0], groups[0][0])
    found: Values = {}
    for members, own in zip(groups, numbers, strict=True):
        for (name, shape), number in zip(members, own, strict=True):
            found[name] = _averages(shares, number, name, shape, len(shares) > 1)
    return found


def check_groups(share: Share, config: ModelConfig) -> None:
    """CheckpointError unless October's AdamW of this model has the groups of that file."""
    share.numbers(adamw_groups(config))


def by_file(share: Share, config: ModelConfig) -> list[Group]:
    """October's groups of Muon as a file has them: by numbers of values, or by shapes, whatever their order."""
    by_count, by_shape = muon_groups(config, False), muon_groups(config, True)
    known = by_count if len(share.groups) == len(by_count) else by_shape
    if len(share.groups) == len(known):
        # The order of the numbers is that of a set: the buffers say which group is which.
        order = [_first_count(share, group["params"]) for group in share.groups]
        placed = {count(members[0][1]): members for members in known}
        if known is by_count and set(order) == set(placed):
            known = [placed[size] for size in order if size is not None]
    share.numbers(known)
    return known


def _first_count(share: Share, numbers: Sequence[int]) -> int | None:
    buffers = (share.state[number].get(BUFFER) for number in numbers if share.holds(number))
    return next((buffer.numel() for buffer in buffers if isinstance(buffer, Tensor)), None)


def muon_values(shares: Sequence[Share], config: ModelConfig) -> Values:
    """October's Muon: of several processes each has the state of every n-th matrix of a group."""
    groups = by_file(shares[0], config)
    found: Values = {}
    for members, own in zip(groups, _numbers(shares, groups), strict=True):
        for (name, shape), number in zip(members, own, strict=True):
            owner = next((share for share in shares if share.holds(number)), shares[0])
            found[name] = {BUFFER: owner.take(number, BUFFER, name, *shape)}
    return found


def _july(shares: Sequence[Share], config: ModelConfig) -> Values:
    by_adamw, by_muon = adamw_groups(config), muon_groups(config, True)
    numbers = _numbers(shares, by_adamw + by_muon)
    _check_processes(shares, numbers[0][0], by_adamw[0][0])
    found: Values = {}
    for members, own in zip(by_adamw, numbers[: len(by_adamw)], strict=True):
        for (name, shape), number in zip(members, own, strict=True):
            cut = len(shares) > 1 and count(shape) >= WHOLE_BELOW
            found[name] = _averages(shares, number, name, shape, cut)
    for members, own in zip(by_muon, numbers[len(by_adamw) :], strict=True):
        name, (rows, columns) = members[0]
        each = -(-len(members) // len(shares))
        shapes = {BUFFER: (rows, columns), SECOND: (rows, 1) if rows >= columns else (1, columns)}
        stacks = {
            what: torch.cat([share.take(own[0], what, name, each, *shape) for share in shares])
            for what, shape in shapes.items()
        }
        for place, (member, _) in enumerate(members):
            found[member] = {what: stack[place] for what, stack in stacks.items()}
    return found


def _numbers(shares: Sequence[Share], groups: Sequence[Group]) -> list[list[int]]:
    found = [share.numbers(groups) for share in shares]
    for share, numbers in zip(shares, found, strict=True):
        if numbers != found[0]:
            raise CheckpointError(
                f"{share.source} numbers its tensors in another way than {shares[0].source}"
            )
    return found[0]


def _averages(
    shares: Sequence[Share], number: int, name: str, shape: tuple[int, ...], cut: bool
) -> dict[str, Tensor]:
    held = shares if cut else shares[:1]
    if shape[0] % len(held):
        raise CheckpointError(f"{shares[0].source}: {name} with {shape[0]} rows is on {len(held)} processes")
    part = (shape[0] // len(held), *shape[1:])
    found = {what: torch.cat([s.take(number, what, name, *part) for s in held]) for what in AVERAGES}
    steps = {float(share.step(number, name)) for share in shares}
    if len(steps) > 1:
        raise CheckpointError(
            f"{shares[0].source}: {STEP} of {name} is another one in the other ranks' files"
        )
    return {**found, STEP: shares[0].step(number, name)}


def _check_processes(shares: Sequence[Share], number: int, largest: tuple[str, tuple[int, ...]]) -> None:
    """CheckpointError if the slice of a large tensor tells another number of processes than there are files."""
    name, shape = largest
    got = shares[0].shape(number, AVERAGES[0], name)
    whole = got[1:] == shape[1:] and got and got[0] and shape[0] % got[0] == 0
    processes = shape[0] // got[0] if whole else len(shares)
    if processes == len(shares) or count(shape) < WHOLE_BELOW:
        return  # or it does not fit at all, which is said of the tensor that does not
    part = f"{shares[0].source}: {AVERAGES[0]} of {name} is one process's share of {processes}"
    if len(shares) > 1 or Path(shares[0].source).stem.endswith("_rank0"):
        lost = f": rank {len(shares)} is missing" if processes > len(shares) else ""
        raise CheckpointError(f"{part}, but there are files of {len(shares)}{lost}")
    raise CheckpointError(f"{part}, and in October 2025 nanochat saved that of the first process alone")


def to_ours(found: Values, config: ModelConfig) -> dict[str, Tensor]:
    """The state of the parameters that have one under our names: joined and split as the weights are."""
    made: dict[str, Tensor] = {}
    for link in links(config):
        for what in found.get(link.theirs[0][0], ()):
            own = OURS.get(what, what)
            values = [found[name][what] for name, _ in link.theirs]
            if what == STEP:
                made |= {f"{own}.{name}": values[0].clone() for name, _ in link.ours}
            elif what == SECOND:  # one value a row or column of each matrix: one matrix after another
                made[f"{own}.{link.ours[0][0]}"] = torch.cat([value.flatten() for value in values])
            else:
                made |= {f"{own}.{name}": tensor for name, tensor in dealt(values, link.ours).items()}
    return made


def _one(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
