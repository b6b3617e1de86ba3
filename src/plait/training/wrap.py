"""What is done to a model's blocks from outside before training: recompute in backward, compile."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What "selective" keeps: the results of sequence ops. At d_model 1024 (E = 2048, bfloat16, one H200) a token's result
# is 4 KiB a layer; computing it again costs about 9 microseconds a MiB for a selective scan, 2 for SSD. The input
# projection costs 1.5 and is twice as large, convolutions and norms less: so those are computed again.
_KEPT_OPS = ("selective_scan", "ssd", "trapezoidal_ssd", "diagonal_ssm")
_KEPT_ATEN = ("scaled_dot_product", "flash_attention_forward", "varlen_attn", "efficient_attention_forward")


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """torch.compile of each block's forward by itself; before ``recompute_blocks``, if both are wanted."""
    for block in blocks:
        block.forward = torch.compile(block.forward)


def recompute_blocks(blocks: Iterable[nn.Module], mode: str = "block") -> None:
    """Activation checkpointing: what backward needs of a block is computed again there. Parameter names stay.

    block: only a block's input is kept. selective: the results of scans and attention as well, the dearest to compute
    again. none: nothing is done. The random numbers of the first forward are used again, so dropout is the same.
    """
    if mode == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    more: dict[str, Any] = {"context_fn": contexts} if mode == "selective" else {}
    for block in blocks:
        # Around forward, inside of the module's hooks, so that FSDP has gathered the weights for both runs.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **more)


def kept(op: Any) -> bool:
    """Whether the results of a torch operator are kept by "selective"."""
    package, _, name = op.name().partition("::")
    if package == "plait":
        return name.startswith(_KEPT_OPS) and "backward" not in name
    return any(part in name for part in _KEPT_ATEN) and "backward" not in name


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if kept(op) else CheckpointPolicy.PREFER_RECOMPUTE
