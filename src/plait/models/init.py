"""Initial weights. Every element is written here, so a model built on the meta device can be filled in."""

from __future__ import annotations

import math
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from plait.config.schema import InitConfig
from plait.mixers.contract import Mixer
from plait.models.heads import LMHead, Unembedding
from plait.nn.embedding import Embedding
from plait.nn.roles import matrix_parts

if TYPE_CHECKING:
    from plait.models.model import Model


@torch.no_grad()
def init_weights(model: Model) -> None:
    """Each layer's own initialisation, then what ``model.config.init`` says.

    Linear maps: torch's U(+-1/sqrt(fan_in)) inside mixers that do not say otherwise, by the scheme in attention,
    MLPs and heads; biases zero. Weights that write into the residual stream are divided by the square root of
    the number of such writes (GPT-2; `rescale_prenorm_residual` of state-spaces), unless `output` says otherwise.
    """
    init = model.config.init
    drawn: set[nn.Module] = set()
    for module in model.modules():
        if module in drawn or isinstance(module, Embedding | Unembedding):
            continue
        if isinstance(module, Mixer) and module.draws_all:
            drawn.update(module.modules())
        if isinstance(reset := getattr(module, "reset_parameters", None), MethodType):
            reset()
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    model.embedding.reset_parameters(init.std if init.embedding is None else init.embedding)
    for block in model.blocks:
        if block.mixer.normal_init:
            _draw(block.mixer, init)
        if block.mlp is not None:
            _draw(block.mlp, init)
            block.mlp.fc1.weight.mul_(init.mlp)
    if model.head is not None:
        _draw(model.head, init)
    if isinstance(model.head, LMHead):
        model.head.unembedding.reset_parameters(init.std if init.head is None else init.head)
    writers = [weight for block in model.blocks for weight in block.residual_weights()]
    for weight in writers:
        if init.output == "zero":
            nn.init.zeros_(weight)
        elif init.output == "depth":
            weight.div_(math.sqrt(len(writers)))
    for index, block in enumerate(model.blocks):
        if block.input_mix is not None:
            place = index / max(1, len(model.blocks) - 1)
            block.input_mix.fill(_between(init.scale, place), _between(init.share, place))


def _draw(part: nn.Module, init: InitConfig) -> None:
    joined = matrix_parts(part)
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear):
            if init.scheme == "fan_in":
                sizes = joined.get(f"{name}.weight", (module.out_features,))
                for weight in module.weight.split(list(sizes)):
                    nn.init.normal_(weight, std=fan_in_std(weight))
            elif init.scheme == "uniform":
                bound = math.sqrt(3 / module.in_features)
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.normal_(module.weight, std=init.std)


def fan_in_std(weight: Tensor) -> float:
    """1/sqrt(fan_in) min(1, sqrt(fan_out/fan_in)): outputs as large as spectral norms ask (arXiv 2310.17813)."""
    fan_out, fan_in = weight.shape
    return fan_in**-0.5 * min(1.0, math.sqrt(fan_out / fan_in))


def _between(ends: tuple[float, float], place: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * place
