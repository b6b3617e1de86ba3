"""Invariant 8: nothing is learnt where there is nothing to learn, and a fixed batch is learnt by heart.

The first catches every leak of a label into its own prediction: on uniform random tokens the loss of an honest model
is never below ln V. For every kind of mixer.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.config.load import load_config
from plait.config.table import kinds
from plait.data.batch import Batch
from plait.models.model import Model
from plait.models.output import Output
from plait.tokenizers.bytes import BytesTokenizer
from plait.training.distributed import World
from plait.training.objectives import make_objective
from plait.training.optimizers import Optimizer
from plait.training.precision import LossScaler
from plait.training.step import train_step

VOCAB, D_MODEL, STEPS = 16, 32, 20
LENGTHS = [20, 1, 12, 31]
HERE = World(0, 1, torch.device("cpu"))
PATTERNS = {**{kind: kind for kind in kinds()}, "hybrid": "mamba2 attention lstm"}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


class Leaky(nn.Module):
    """A model whose labels were shifted before: each token is to predict itself."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **inputs: Any) -> Output:
        out: Output = self.model(labels=labels.roll(1, 1), **inputs)
        return out


def losses(pattern: str, batches: list[Batch], lr: float, leaky: bool = False) -> list[float]:
    """Train a tiny model on the batches, one step each: the loss of each step, before it."""
    config = load_config(
        {
            "model": {"d_model": D_MODEL, "pattern": pattern, "vocab_size": 260, "mlp": "none"},
            "training": {"lr": lr, "grad_clip": 1.0},
        }
    )
    model = Model(config.model.model_copy(update={"vocab_size": VOCAB})).train()
    objective = make_objective(config, BytesTokenizer())
    optimizer, scaler = Optimizer(model, config.training), LossScaler("fp32")
    forward = Leaky(model) if leaky else model
    found = []
    for batch in batches:
        optimizer.set_lr(1.0)
        update = train_step(
            forward, objective, optimizer, [batch], batch.n_targets, config.training, scaler, HERE
        )
        found.append(update.loss)
    return found


def packed(lengths: list[int]) -> Batch:
    """Fresh uniform random tokens in documents of these lengths."""
    return batch_of(torch.randint(VOCAB, (1, sum(lengths))), lengths)


def batch_of(ids: Tensor, lengths: list[int]) -> Batch:
    """Documents side by side in ids (1, n)."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    n_targets = sum(length - 1 for length in lengths)
    return Batch(ids, ids, ids.shape[1], n_targets, bounds, max(lengths))


@patterns
def test_random_tokens_are_not_predicted(pattern: str) -> None:
    found = losses(pattern, [packed(LENGTHS * 8) for _ in range(STEPS)], lr=1e-2)
    assert min(found) > math.log(VOCAB) - 0.02
    assert found[-1] < math.log(VOCAB) + 0.1, "it did not train at all"


@pytest.mark.parametrize("pattern", ["mamba2", "attention"])
def test_a_leak_is_caught(pattern: str) -> None:
    found = losses(pattern, [packed(LENGTHS * 8) for _ in range(STEPS)], lr=1e-2, leaky=True)
    assert found[-1] < math.log(VOCAB) - 0.5


@patterns
def test_a_fixed_batch_is_learnt_by_heart(pattern: str) -> None:
    # No token twice in a document ("a" and "a a" look the same to a single attention layer), no two begin alike.
    lengths, order = [9, 1, 12], torch.randperm(VOCAB)
    ids = torch.cat([order.roll(5 * i)[:length] for i, length in enumerate(lengths)])
    found = losses(pattern, [batch_of(ids[None], lengths)] * 60, lr=2e-2)
    assert found[-1] < 0.05
