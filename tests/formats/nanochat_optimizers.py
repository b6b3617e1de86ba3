"""Optimizers grouped, numbered and saved as nanochat's are, for its tests: written from their description.

The weights have nanochat's names; the gradients come from Plait's model, whose names and joints are taken apart first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.formats.foreign import Tensors
from plait.formats.nanochat_layout import to_ours, to_theirs
from plait.models.loss import cross_entropy
from plait.models.model import Model
from plait.training.muon import NEWTON_SCHULZ, POLAR_EXPRESS

Weights = dict[str, nn.Parameter]
SCALARS = ("resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda")


def weights_of(tensors: Mapping[str, Tensor]) -> Weights:
    """nanochat's parameters, in the order of its state dict."""
    return {name: nn.Parameter(tensor.detach().clone().float()) for name, tensor in tensors.items()}


def blocks(weights: Weights) -> list[nn.Parameter]:
    return [weight for name, weight in weights.items() if name.startswith("transformer.h.")]


def iterate(x: Tensor, coefficients: Any) -> Tensor:
    """Newton and Schulz's iteration on the wide form of a matrix."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    for a, b, c in coefficients:
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


class October(torch.optim.Optimizer):
    """Muon of October 2025, one process, in float32: groups by the numbers of values."""

    def __init__(self, weights: Weights, lr: float = 0.02, by_shape: bool = False) -> None:
        members = blocks(weights)
        if by_shape:
            shapes = sorted({p.shape for p in members})
            groups = [{"params": [p for p in members if p.shape == shape]} for shape in shapes]
            for group in groups:
                group["zero_buffer"] = torch.zeros_like(group["params"][0])  # type: ignore[assignment]
        else:
            sizes = {p.numel() for p in members}
            groups = [{"params": [p for p in members if p.numel() == size]} for size in sizes]
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "nesterov": True, "ns_steps": 5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            m = group["momentum"]
            for p in group["params"]:
                assert p.grad is not None
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                buffer.mul_(m).add_(p.grad, alpha=1 - m)
                update = (1 - m) * p.grad + m * buffer
                update = iterate(update / (update.norm() + 1e-7), [NEWTON_SCHULZ] * group["ns_steps"])
                p.sub_(update, alpha=group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def october(weights: Weights, width: int, by_shape: bool = False) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon] as setup_optimizers of October gives them."""
    scale = (width / 768) ** -0.5
    rates = {"lm_head.weight": 0.004, "transformer.wte.weight": 0.2}
    groups = [{"params": [weights[name]], "lr": rate * scale} for name, rate in rates.items()]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    found: list[torch.optim.Optimizer] = [adamw, October(weights, by_shape=by_shape)]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


class July(torch.optim.Optimizer):
    """MuonAdamW of July 2026, one process, in float32; Muon's state lies stacked under a group's first matrix."""

    def __init__(self, weights: Weights, width: int, weight_decay: float = 0.28) -> None:
        scale = (width / 768) ** -0.5
        tables = [weight for name, weight in weights.items() if name.startswith("value_embeds.")]
        resid, x0, *smear = (weights[name] for name in SCALARS)
        rows = [
            ([weights["lm_head.weight"]], 0.008 * scale, (0.8, 0.96), 0.01),
            ([weights["transformer.wte.weight"]], 0.3 * scale, (0.8, 0.995), 0.001),
            (tables, 0.15 * scale, (0.8, 0.995), 0.01),
            ([resid], 0.005, (0.8, 0.95), 0.05),
            ([x0], 0.5, (0.96, 0.95), 0.0),
            (smear, 0.2, (0.8, 0.95), 0.0),
        ]
        groups: list[dict[str, Any]] = [
            {"kind": "adamw", "params": p, "lr": lr, "betas": betas, "eps": 1e-10, "weight_decay": decay}
            for p, lr, betas, decay in rows
        ]
        muon = {"lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": weight_decay}
        members = blocks(weights)
        for shape in sorted({p.shape for p in members}):
            groups.append({"kind": "muon", "params": [p for p in members if p.shape == shape], **muon})
        super().__init__(groups, {})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for p in group["params"]:
                    self._adamw(p, group)
            else:
                self._muon(group)

    def _adamw(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        p.mul_(1 - group["lr"] * group["weight_decay"])
        for what, value, beta in zip(
            ("exp_avg", "exp_avg_sq"), (p.grad, p.grad.square()), group["betas"], strict=True
        ):
            state[what].mul_(beta).add_(value, alpha=1 - beta)
        first, second = (1 - beta ** state["step"] for beta in group["betas"])
        root = (state["exp_avg_sq"] / second).sqrt() + group["eps"]
        p.sub_(state["exp_avg"] / root, alpha=group["lr"] / first)

    def _muon(self, group: dict[str, Any]) -> None:
        members = group["params"]
        rows, columns = members[0].shape
        state, along = self.state[members[0]], 1 if rows >= columns else 0
        if not state:
            line = (rows, 1) if along else (1, columns)
            state["momentum_buffer"] = torch.zeros(len(members), rows, columns)
            state["second_momentum_buffer"] = torch.zeros(len(members), *line)
        lr, m = group["lr"] * math.sqrt(max(1.0, rows / columns)), group["momentum"]
        for place, p in enumerate(members):
            buffer, second = state["momentum_buffer"][place], state["second_momentum_buffer"][place]
            buffer.mul_(m).add_(p.grad, alpha=1 - m)
            x = (1 - m) * p.grad + m * buffer
            x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-6) * x.norm() / math.sqrt(rows)
            x = iterate(x / (x.norm() * 1.01 + 1e-6), POLAR_EXPRESS[: group["ns_steps"]])
            x = x * math.sqrt(min(rows, columns)) / x.norm()
            squares = x.square().mean(dim=along, keepdim=True)
            second.mul_(group["beta2"]).add_(squares, alpha=1 - group["beta2"])
            even = x / second.clamp_min(1e-10).sqrt()
            x = even * x.norm() / even.norm()
            p.sub_(lr * (x + group["weight_decay"] * p * (x * p >= 0)))


def shares(state: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """July's state of one process, as each of several would have saved its share of it."""
    found = []
    for rank in range(processes):
        own: dict[int, dict[str, Any]] = {}
        for group in state["param_groups"]:
            numbers = group["params"]
            if group["kind"] == "muon":
                each = math.ceil(len(numbers) / processes)
                own[numbers[0]] = {
                    what: torch.cat([stack, torch.zeros(each * processes - len(stack), *stack.shape[1:])])[
                        rank * each : (rank + 1) * each
                    ].clone()
                    for what, stack in state["state"][numbers[0]].items()
                }
                continue
            for number in numbers:
                entry = state["state"][number]
                own[number] = {
                    what: value.chunk(processes)[rank].clone()
                    if isinstance(value, Tensor) and value.numel() >= 1024
                    else value
                    for what, value in entry.items()
                }
        found.append({"state": own, "param_groups": state["param_groups"]})
    return found


def november(state: list[dict[str, Any]], processes: int) -> list[list[dict[str, Any]]]:
    """The states of AdamW and of Muon by shapes, as each of several processes saved its share after October."""
    adamw, muon = state
    found = []
    for rank in range(processes):
        sliced = {
            number: {
                what: v.chunk(processes)[rank].clone() if v.dim() else v.long() for what, v in entry.items()
            }
            for number, entry in adamw["state"].items()
        }
        owned = {
            number: muon["state"][number]
            for group in muon["param_groups"]
            for place, number in enumerate(group["params"])
            if place % processes == rank
        }
        found.append([{**adamw, "state": sliced}, {**muon, "state": owned}])
    return found


def loss_of(model: Model, ids: Tensor, targets: Tensor) -> Tensor:
    total, count = cross_entropy(model(ids).logits, targets.masked_fill(targets < 0, -100))
    return total / count


def set_gradients(model: Model, weights: Weights, loss: Callable[[], Tensor]) -> None:
    """The gradients of a loss of the model at these weights, under nanochat's names."""
    put(model, weights)
    model.zero_grad(set_to_none=True)
    loss().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in to_theirs(found, model.config).items():
        weights[name].grad = gradient


def put(model: Model, weights: Weights) -> None:
    """nanochat's weights into the model."""
    own = to_ours(Tensors({name: w.detach() for name, w in weights.items()}, "test"), model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own[name])
