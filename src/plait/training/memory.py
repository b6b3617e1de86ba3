"""The memory of a training step, found by running it on tensors that have sizes but no numbers.

Every storage that the step makes is counted from its birth to its death; the largest sum is the peak. Nothing is
allocated, so a model of any size can be asked about. What a kernel takes for itself and gives back is not seen.

Memory is linear in the tokens, however they are cut into sequences (no op builds a (T, T) matrix, but attention with
dropout): so long sequences are run as more, shorter ones, which spares the loops over time.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plait.config.schema import ModelConfig
from plait.config.training import TrainingConfig
from plait.models.model import Model
from plait.training.optimizers import Optimizer
from plait.training.precision import autocast
from plait.training.wrap import recompute_blocks

_STEPS = 2  # the first makes the optimizer's state, so only the second is like all others
_MICRO_BATCHES = 2  # of an accumulated step: in the first there are no gradients yet
_SHORT = 128  # tokens; longer sequences are cut


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process: what lasts, and the most that lives at one time."""

    weights: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def activations(self) -> int:
        """What the peak holds beside weights, gradients and the optimizer's state."""
        return self.peak - self.weights - self.gradients - self.optimizer


class Census(TorchDispatchMode):
    """Counts the bytes of all storages made inside of it: ``now``, and the most there were, ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it dies; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result


def step_memory(
    model: ModelConfig,
    training: TrainingConfig,
    rows: int,
    length: int,
    *,
    accumulate: bool,
    device: torch.device,
) -> StepMemory:
    """The memory of a step whose forward has ``rows`` sequences of ``length`` tokens.

    accumulate: the step has several micro-batches. Optimizer, precision and recomputation are the config's;
    its objective is the model's head.
    """
    if length > _SHORT and not any(
        layer.options.model_dump().get("attn_dropout") for layer in model.layers()
    ):
        rows, length = -(-rows * length // _SHORT), _SHORT
    with FakeTensorMode():
        built = Model(model, device=device).train()
        recompute_blocks(built.blocks, training.activation_checkpointing)
        optimizer = Optimizer(built, training)
        optimizer.set_lr(1.0)
        with Census() as census:
            for parameter in built.parameters():
                census.count(parameter)
            weights = census.now
            for _ in range(_STEPS):
                optimizer.zero_grad()
                for _ in range(_MICRO_BATCHES if accumulate else 1):
                    _forward_and_backward(built, training, rows, length, device)
                torch.nn.utils.get_total_norm(optimizer.gradients())
                optimizer.step()
            gradients = sum(g.untyped_storage().nbytes() for g in optimizer.gradients())
    return StepMemory(weights, gradients, census.now - weights - gradients, census.peak)


def _forward_and_backward(
    model: Model, training: TrainingConfig, rows: int, length: int, device: torch.device
) -> None:
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    labels = ids
    if model.config.head.kind == "classification":
        real = model.config.head.num_labels == 1
        labels = torch.zeros(rows, dtype=torch.float32 if real else torch.int64, device=device)
    with autocast(training.precision, device):
        loss = model(ids, labels=labels).loss_sum
    loss.backward()
