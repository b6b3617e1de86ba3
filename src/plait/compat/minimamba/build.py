"""From MiniMamba's configurations to Plait's model, and how one of its faces runs it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.compat.minimamba.config import BaseMambaConfig
from plait.compat.minimamba.inference import InferenceParams
from plait.compat.minimamba.mixers import MixerClass, mixer_kind
from plait.config.errors import BuildError
from plait.config.originals.minimamba import model_section
from plait.config.schema import ModelConfig
from plait.models.model import Model
from plait.models.output import Output
from plait.nn.roles import cast_parameters
from plait.ops.dispatch import use_backend
from plait.training.wrap import recompute_blocks

HeadKind = Literal["lm", "classification", "features"]


def model_config(config: BaseMambaConfig, head: HeadKind, mixer_cls: MixerClass | None = None) -> ModelConfig:
    """The model of a configuration in our schema."""
    kind = mixer_kind(mixer_cls, type(config))
    section = model_section(config.checked(), head, kind)
    if kind != "mamba":
        section[kind] = {"config": config.to_dict()}
    return ModelConfig.model_validate(section)


def new_model(config: BaseMambaConfig, described: ModelConfig) -> Model:
    """A new model of ``described``, on the device and of the dtype that the configuration names."""
    model = Model(described, device=config.device)
    cast(model, config)
    if config.gradient_checkpointing:
        recompute(model, config)
    return model


def cast(module: nn.Module, config: BaseMambaConfig) -> None:
    """Give a model or a part of one the dtype that the configuration names, if it names one."""
    dtype = config.checked().dtype
    if dtype is not None:
        cast_parameters(module, getattr(torch, dtype))


def recompute(model: Model, config: BaseMambaConfig) -> None:
    """Keep of each layer its input alone and compute it again in backward, by the same backend."""
    for block in model.blocks:
        block.forward = partial(_within, config, block.forward)  # type: ignore[method-assign]
    recompute_blocks(list(model.blocks))


def backend(config: BaseMambaConfig) -> AbstractContextManager[Any]:
    """Within it ops run as ``use_fast_path`` says."""
    return nullcontext() if config.use_fast_path else use_backend("portable")


def run(
    model: Model, config: BaseMambaConfig, params: InferenceParams | None, tokens: Tensor, **inputs: Any
) -> Output:
    """The model on ids (B, L) or vectors (B, L, d_model), which go on from ``params`` if that is given."""
    if params is not None and not isinstance(params, InferenceParams):
        raise BuildError(f"inference_params is a {type(params).__name__}; it must be InferenceParams")
    given = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
    with backend(config):
        cache = None if params is None else params.attached(model, tokens.shape[0])
        # logits at once: MiniMamba gives them with the loss
        out: Output = model(**given, **inputs, cache=cache, logits=True)
    if params is not None:
        assert out.cache is not None
        params.keep(out.cache)
    return out


def _within(config: BaseMambaConfig, forward: Any, *inputs: Any) -> Any:
    with backend(config):
        return forward(*inputs)
