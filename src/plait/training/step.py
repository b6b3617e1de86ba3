"""One update of the weights: forward and backward over the micro-batches, one check, one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.config.errors import TrainingError
from plait.config.training import TrainingConfig
from plait.data.batch import Batch
from plait.training.distributed import World, exchange, whole
from plait.training.objectives import Objective
from plait.training.optimizers import Optimizer
from plait.training.precision import LossScaler, autocast


@dataclass(frozen=True)
class Update:
    """What one step did, over all processes."""

    loss: float  # nats a target, before the step
    n_targets: int
    grad_norm: float  # before clipping
    skipped: bool = False  # the weights were left: the loss or the gradient was not finite
    overflowed: bool = False  # as float16's may be now and then: the loss scale was halved


class NotFinite(TrainingError):
    """The loss or the gradient is not a number; the weights were left as they were."""


def train_step(
    forward: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    n_targets: int,
    config: TrainingConfig,
    scaler: LossScaler,
    world: World,
    may_skip: bool = False,
) -> Update:
    """Accumulate over this process's micro-batches, divide by the ``n_targets`` of all processes, clip, step.

    If the loss or the gradient is infinite or not a number, no weight changes: raises NotFinite, or with
    ``may_skip`` says so.
    """
    optimizer.zero_grad()
    # DDP and FSDP average gradients over the processes; the loss is a sum over them.
    factor = scaler.scale * world.size / max(1, n_targets)
    total = torch.zeros((), dtype=torch.float32, device=world.device)
    for index, batch in enumerate(batches):
        with exchange(forward, last=index == len(batches) - 1):
            with autocast(config.precision, world.device):
                loss_sum = objective.run(forward, batch.to(world.device, non_blocking=True)).loss_sum
            assert loss_sum is not None
            # A batch without targets only keeps step with the other processes.
            (loss_sum * (factor if batch.n_targets else 0.0)).backward()
            if batch.n_targets:
                total += loss_sum.detach()
    gradients, scale = optimizer.gradients(), scaler.scale
    # The one time that the host waits for the device in a step.
    own, norm = torch.stack([total, whole(torch.nn.utils.get_total_norm(gradients)).to(total)]).tolist()
    norm /= scale
    loss = world.sums([own])[0] / max(1, n_targets)
    if not math.isfinite(loss):
        if may_skip:
            return Update(loss, n_targets, math.nan, skipped=True)
        raise NotFinite(f"the loss is {loss}")
    if not scaler.accept(norm):
        if not (scaler.active or may_skip):
            raise NotFinite(f"the norm of the gradient is {norm}")
        return Update(loss, n_targets, norm, skipped=True, overflowed=scaler.active)
    _shrink(gradients, norm, scale, config.grad_clip)
    optimizer.step()
    return Update(loss, n_targets, norm)


@torch.no_grad()
def _shrink(gradients: list[Tensor], norm: float, scale: float, most: float | None) -> None:
    """Undo the loss scale, and bring the whole gradient's norm down to ``most``."""
    factor = 1.0 / scale
    if most is not None and norm > most:
        factor *= most / norm
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
