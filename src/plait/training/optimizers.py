"""One optimizer for a whole model, its groups by the declared roles of the parameters.

    group        role                            by                 weight decay    peak rate
    muon         matrix, with optimizer: muon    Muon (muon.py)     yes             muon_lr
    matrix       matrix otherwise                AdamW              yes             lr
    embedding    embedding                       AdamW              no              embedding_lr
    unembedding  unembedding                     AdamW              no              unembedding_lr
    vector       vector                          AdamW              no              lr

``training.groups`` gives the parameters whose names match a pattern what they have of their own. Hyperparameters
are the config's, never a checkpoint's; the state is kept under the names of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError, TrainingError
from plait.config.training import TrainingConfig
from plait.models.model import Model
from plait.nn.roles import matrix_parts, parameter_roles
from plait.training.muon import Muon

GROUPS = ("muon", "matrix", "embedding", "unembedding", "vector")


@dataclass(frozen=True)
class Group:
    """What the optimizer does with some parameters: its name is a role's, or a pattern of ``training.groups``."""

    name: str
    muon: bool
    lr: float  # peak
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scheduled: bool  # whether the decay follows weight_decay_schedule


def parameter_groups(model: nn.Module, optimizer: str = "adamw") -> dict[str, str]:
    """The group of every parameter by its role, by name. Muon takes matrices of two dimensions only."""
    roles = parameter_roles(model)
    groups: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        kind = roles[name].kind
        by_muon = kind == "matrix" and optimizer == "muon" and parameter.dim() == 2
        groups[name] = "muon" if by_muon else kind
    return groups


def assigned_groups(model: Model, config: TrainingConfig) -> dict[str, Group]:
    """The Group of every parameter, by name; TrainingError for a pattern that matches none."""
    width = model.config.d_model
    by_role = {role: _role_group(role, config, width) for role in GROUPS}
    own: dict[str, Group] = {}
    unused = dict.fromkeys(config.groups)
    for name, role in parameter_groups(model, config.optimizer).items():
        own[name] = by_role[role]
        pattern = next((p for p in config.groups if fnmatchcase(name, p)), None)
        if pattern is not None:
            unused.pop(pattern, None)
            own[name] = _special(pattern, by_role[role], role, config, width)
        if own[name].muon and model.get_parameter(name).dim() != 2:
            shape = tuple(model.get_parameter(name).shape)
            raise TrainingError(f"training.groups: Muon takes matrices, {name} has the shape {shape}")
    for pattern in unused:
        raise TrainingError(
            f"training.groups: no parameter is left for {pattern!r}; there are {', '.join(list(own)[:8])}, ... "
            "(plait info shows a model's parts)"
        )
    return own


def _role_group(role: str, config: TrainingConfig, width: int) -> Group:
    decayed = role in ("muon", "matrix")
    decay = config.weight_decay if decayed else 0.0
    if role == "muon" and config.muon.weight_decay is not None:
        decay = config.muon.weight_decay
    embedding = config.embedding_lr or config.lr
    peaks = {
        "muon": config.muon_lr or config.lr,
        "embedding": embedding,
        "unembedding": config.unembedding_lr or embedding,
    }
    lr = peaks.get(role, config.lr) * _width_factor(role, config, width)
    return Group(role, role == "muon", lr, config.betas, config.eps, decay, decayed)


def _special(pattern: str, base: Group, role: str, config: TrainingConfig, width: int) -> Group:
    given = config.groups[pattern]
    muon = base.muon if given.optimizer is None else given.optimizer == "muon"
    if muon != base.muon:  # as if its role were the other one of matrices
        base = _role_group("muon" if muon else "matrix", config, width)
    lr = base.lr if given.lr is None else given.lr * _width_factor(role, config, width)
    return replace(
        base,
        name=pattern,
        lr=lr,
        betas=given.betas or base.betas,
        eps=given.eps or base.eps,
        weight_decay=base.weight_decay if given.weight_decay is None else given.weight_decay,
        scheduled=base.scheduled and given.weight_decay is None,
    )


def _width_factor(role: str, config: TrainingConfig, width: int) -> float:
    if config.embedding_lr_width is None or role not in ("embedding", "unembedding"):
        return 1.0
    return float((width / config.embedding_lr_width) ** -0.5)


class Optimizer:
    """AdamW, or Muon and AdamW, behind one face; steps, zeroes, and gives its state by parameter name."""

    def __init__(self, model: Model, config: TrainingConfig) -> None:
        self.groups = assigned_groups(model, config)
        self.named = dict(model.named_parameters())
        members: dict[Group, list[nn.Parameter]] = {}
        for name, group in self.groups.items():
            members.setdefault(group, []).append(self.named[name])
        adamw = [_adamw_group(group, own) for group, own in members.items() if not group.muon]
        muon = [_group(group, own) for group, own in members.items() if group.muon]
        self.parts: list[torch.optim.Optimizer] = []
        if adamw:
            fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
            self.parts.append(torch.optim.AdamW(adamw, lr=config.lr, fused=fused))
        if muon:
            joined = matrix_parts(model) if config.muon.parts else {}
            by_parameter = {self.named[name]: sizes for name, sizes in joined.items() if name in self.named}
            self.parts.append(Muon(muon, config.muon, by_parameter))

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """Every parameter."""
        return self.named.values()

    def describe(self) -> list[str]:
        """Each group with its numbers of tensors and of values, for people."""
        lines = []
        for group in sorted(set(self.groups.values()), key=_place):
            sizes = [self.named[name].numel() for name, own in self.groups.items() if own == group]
            by = "Muon" if group.muon else "AdamW"
            decay = "decay" if group.weight_decay else "no decay"
            what = "matrix" if group.name == "muon" else group.name
            lines.append(f"{what} {sum(sizes):,} in {len(sizes)} ({by}, {decay})")
        return lines

    def gradients(self) -> list[Tensor]:
        """The gradients there are."""
        return [p.grad for p in self.named.values() if p.grad is not None]

    def set_lr(self, scale: float) -> None:
        """Set each group's learning rate to ``scale`` times its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * scale

    def set_decay(self, scale: float) -> None:
        """Set the weight decay of the groups that follow the schedule to ``scale`` times its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["weight_decay"] = group["peak_decay"] * (scale if group["scheduled"] else 1.0)

    def set_momentum(self, momentum: float) -> None:
        """Set Muon's momentum."""
        for part in self.parts:
            if isinstance(part, Muon):
                for group in part.param_groups:
                    group["momentum"] = momentum

    def step(self) -> None:
        """Update the weights; it may use up the gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The state's own tensors under ``<what>.<parameter name>``; zeros where no step was made yet.

        Writing into these tensors (as a checkpoint's loader does) sets the state. Sharded parameters give
        sharded tensors.
        """
        found: dict[str, Tensor] = {}
        names = {id(parameter): name for name, parameter in self.named.items()}
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    if not part.state[parameter]:
                        part.state[parameter].update(_zero_state(part, parameter))
                    for what, value in part.state[parameter].items():
                        found[f"{what}.{names[id(parameter)]}"] = value
        return found


def _place(group: Group) -> tuple[int, str]:
    return (GROUPS.index(group.name) if group.name in GROUPS else len(GROUPS), group.name)


def _group(group: Group, members: list[nn.Parameter]) -> dict[str, Any]:
    return {
        "params": members,
        "lr": group.lr,
        "peak": group.lr,
        "weight_decay": group.weight_decay,
        "peak_decay": group.weight_decay,
        "scheduled": group.scheduled,
    }


def _adamw_group(group: Group, members: list[nn.Parameter]) -> dict[str, Any]:
    return {**_group(group, members), "betas": group.betas, "eps": group.eps}


def _zero_state(part: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    # What the first step would have made; a state without a step changes nothing.
    if isinstance(part, Muon):
        return part.new_state(parameter)
    if isinstance(part, torch.optim.AdamW):
        zeros = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
        device = parameter.device if part.defaults["fused"] else "cpu"
        return {**zeros, "step": torch.zeros((), dtype=torch.float32, device=device)}
    raise BuildError(f"{type(part).__name__} is not an optimizer whose state is known here")
