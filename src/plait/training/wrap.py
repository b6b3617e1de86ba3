"""What is done to a model's blocks from outside before training: recompute in backward, compile."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """torch.compile of each block's forward by itself; before ``recompute_blocks``, if both are wanted."""
    for block in blocks:
        block.forward = torch.compile(block.forward)


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Activation checkpointing: of each block only its input is kept; backward runs its forward again.

    The random numbers of the first forward are used again, so dropout is the same. Parameter names stay.
    """
    for block in blocks:
        # Around forward, inside of the module's hooks, so that FSDP has gathered the weights for both runs.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
