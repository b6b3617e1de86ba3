"""Initial weights. Every element is written here, so a model built on the meta device can be filled in."""

from __future__ import annotations

import math
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import nn

from plait.models.heads import LMHead, Unembedding
from plait.nn.embedding import Embedding

if TYPE_CHECKING:
    from plait.models.model import Model


@torch.no_grad()
def init_weights(model: Model) -> None:
    """Each layer's own initialisation, then the embedding's N(0, init_std) and the depth scaling.

    Linear maps: torch's U(+-1/sqrt(fan_in)) inside mixers that do not say otherwise, N(0, init_std) in
    attention, MLPs and heads; biases zero. Weights that write into the residual stream are divided by the
    square root of the number of such writes (GPT-2; `rescale_prenorm_residual` of state-spaces).
    """
    std = model.config.init_std
    for module in model.modules():
        if isinstance(module, Embedding | Unembedding):
            continue
        if isinstance(reset := getattr(module, "reset_parameters", None), MethodType):
            reset()
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    model.embedding.reset_parameters(std)
    for block in model.blocks:
        for part in (block.mixer if block.mixer.normal_init else None, block.mlp):
            _normal(part, std)
    _normal(model.head, std)
    if isinstance(model.head, LMHead):
        model.head.unembedding.reset_parameters(std)
    writers = [weight for block in model.blocks for weight in block.residual_weights()]
    for weight in writers:
        weight.div_(math.sqrt(len(writers)))


def _normal(part: nn.Module | None, std: float) -> None:
    if part is None:
        return
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
