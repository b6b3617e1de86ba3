"""One optimizer for a whole model, its groups by the declared roles of the parameters.

    group       role                            by                       weight decay
    muon        matrix, with optimizer: muon    Muon (torch.optim.Muon)  yes
    matrix      matrix otherwise                AdamW                    yes
    embedding   embedding                       AdamW                    no
    vector      vector                          AdamW                    no

Muon's updates are scaled to the size of AdamW's (0.2 sqrt(max(n, m)), arXiv 2502.16982), so one learning
rate serves both. Hyperparameters are the config's, never a checkpoint's; the state is kept under the names
of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.config.training import TrainingConfig
from plait.nn.roles import parameter_roles

GROUPS = ("muon", "matrix", "embedding", "vector")


def parameter_groups(model: nn.Module, optimizer: str = "adamw") -> dict[str, str]:
    """The group of every parameter, by name. Muon takes matrices of two dimensions only."""
    roles = parameter_roles(model)
    groups: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        kind = roles[name].kind
        by_muon = kind == "matrix" and optimizer == "muon" and parameter.dim() == 2
        groups[name] = "muon" if by_muon else kind
    return groups


class Optimizer:
    """AdamW, or Muon and AdamW, behind one face; steps, zeroes, and gives its state by parameter name."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.groups = parameter_groups(model, config.optimizer)
        self.named = dict(model.named_parameters())
        members: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
        for name, group in self.groups.items():
            members[group].append(self.named[name])
        peaks = {"embedding": config.embedding_lr or config.lr, "matrix": config.lr, "vector": config.lr}
        adamw = [
            {
                "params": members[group],
                "weight_decay": config.weight_decay if group == "matrix" else 0.0,
                "peak": peak,
            }
            for group, peak in peaks.items()
            if members[group]
        ]
        self.parts: list[torch.optim.Optimizer] = []
        if adamw:
            fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
            self.parts.append(
                torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
            )
        if members["muon"]:
            matrices: dict[str, Any] = {"params": members["muon"], "peak": config.muon_lr or config.lr}
            self.parts.append(
                torch.optim.Muon(
                    [matrices],
                    weight_decay=config.weight_decay,
                    momentum=config.muon_momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """Every parameter."""
        return self.named.values()

    def describe(self) -> list[str]:
        """Each group with its numbers of tensors and of values, for people."""
        lines = []
        for group in GROUPS:
            sizes = [self.named[name].numel() for name, own in self.groups.items() if own == group]
            if sizes:
                by = "Muon" if group == "muon" else "AdamW"
                decay = "decay" if group in ("muon", "matrix") else "no decay"
                what = "matrix" if group == "muon" else group
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

    def step(self) -> None:
        """Update the weights."""
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


def _zero_state(part: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    # What the first step would have made; a state without a step changes nothing.
    zeros = {name: torch.zeros_like(parameter.detach()) for name in _buffers(part)}
    if isinstance(part, torch.optim.AdamW):
        device = parameter.device if part.defaults["fused"] else "cpu"
        zeros["step"] = torch.zeros((), dtype=torch.float32, device=device)
    return zeros


def _buffers(part: torch.optim.Optimizer) -> tuple[str, ...]:
    if isinstance(part, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    if isinstance(part, torch.optim.Muon):
        return ("momentum_buffer",)
    raise BuildError(f"{type(part).__name__} is not an optimizer whose state is known here")
