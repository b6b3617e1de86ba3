"""How good a model is on held-out rows: nats a target, bits a byte of text, right labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.config.training import TrainingConfig
from plait.data.batch import Batch
from plait.inference.generate import evaluating
from plait.training.distributed import World
from plait.training.objectives import Objective, target_bytes
from plait.training.precision import autocast


@dataclass(frozen=True)
class Evaluation:
    """Means over all targets of all processes."""

    loss: float  # nats a target
    n_targets: int
    bits_per_byte: float | None = None  # None where targets are no text
    accuracy: float | None = None  # of classes


@torch.no_grad()
def evaluate(
    model: nn.Module,
    forward: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    token_bytes: Tensor,
    config: TrainingConfig,
    world: World,
) -> Evaluation:
    """Run held-out batches through the model, in eval mode; every process gets the result."""
    nats = torch.zeros(
        (), dtype=torch.float32 if world.device.type == "mps" else torch.float64, device=world.device
    )
    counts = [0.0, 0.0, 0.0, 0.0]  # targets, bytes, right, judged
    with evaluating(model):
        for batch in batches:
            moved = batch.to(world.device, non_blocking=True)
            with autocast(config.precision, world.device):
                out = objective.run(forward, moved)
            if batch.n_targets == 0:
                continue
            assert out.loss_sum is not None
            nats += out.loss_sum
            counts[0] += batch.n_targets
            counts[1] += target_bytes(objective, batch, token_bytes)
            correct = objective.correct(out, moved)
            if correct is not None:
                counts[2] += int(correct)
                counts[3] += batch.n_targets
    total, n_targets, n_bytes, right, judged = world.sums([float(nats), *counts])
    return Evaluation(
        loss=total / max(1.0, n_targets),
        n_targets=int(n_targets),
        bits_per_byte=total / (math.log(2) * n_bytes) if n_bytes else None,
        accuracy=right / judged if judged else None,
    )
