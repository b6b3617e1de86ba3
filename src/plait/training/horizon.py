"""How many steps a run has: given, or from passes over the data, tokens for each parameter, or operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plait.config.training import TrainingConfig
from plait.config.words import counted
from plait.models.model import Model
from plait.nn.roles import parameter_roles

BACKWARD = 2  # backward is two products for each of forward's


@dataclass(frozen=True)
class Horizon:
    """The number of steps, and why it is that."""

    steps: int
    reason: str  # "" if it was given


def horizon(
    training: TrainingConfig, model: Model, length: int, batch_rows: int, rows: int | None
) -> Horizon | None:
    """The steps of a run over ``rows`` rows an epoch, each ``length`` tokens long, ``batch_rows`` in a step.

    At least one. None if it goes by epochs and ``rows`` is not known (None).
    """
    if training.epochs is not None:
        if rows is None:
            return None
        steps = math.ceil(training.epochs * rows / batch_rows)
        return Horizon(steps, f"{counted(training.epochs, 'epoch')} of {counted(rows, 'row')}")
    if training.tokens_per_parameter is not None:
        count = counted_parameters(model, training.parameters_counted)
        steps = int(training.tokens_per_parameter * count) // (batch_rows * length)
        what = "parameters" if training.parameters_counted == "all" else "parameters in products"
        return Horizon(
            max(1, steps), f"{training.tokens_per_parameter:g} tokens for each of {count:,} {what}"
        )
    if training.flops is not None:
        of_step = (1 + BACKWARD) * batch_rows * model.flops(length)
        return Horizon(
            max(1, round(training.flops / of_step)), f"{training.flops:.3g} FLOPs, {of_step:.3g} a step"
        )
    return Horizon(training.steps, "")


def counted_parameters(model: Model, which: str) -> int:
    """The number of parameters: all of them, or of the matrices of blocks and output, a tied output's too."""
    if which == "all":
        return sum(parameter.numel() for parameter in model.parameters())
    roles = parameter_roles(model)
    kinds = {"matrix", "unembedding"}
    counted = [name for name, role in roles.items() if role.kind in kinds]
    if model.config.head.kind in ("lm", "masked_lm") and model.config.head.tie:
        counted.append("embedding.tokens.weight")
    return sum(model.get_parameter(name).numel() for name in counted)
