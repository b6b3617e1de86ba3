"""The registry of architectures: Foundry's six, and those of your own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from plait.compat.foundry.architectures.base import BaseLanguageModel
from plait.compat.foundry.architectures.face import PlaitLanguageModel
from plait.compat.foundry.architectures.own import register_own
from plait.config.errors import ConfigError, nearest

MODEL_REGISTRY: dict[str, type[BaseLanguageModel]] = {}
_LOGGER = logging.getLogger(__name__)
C = TypeVar("C", bound=type[BaseLanguageModel])


def register_architecture(name: str) -> Callable[[C], C]:
    """Class decorator: a BaseLanguageModel that ``create_model_from_config`` and the trainer then know by ``name``.

    An ExperimentConfig may name it as ``model.architecture`` from then on. It is built by its ``from_config``; the
    trainer gives that the sections ``model``, ``tokenizer.vocab_size``, ``data.max_sequence_length`` and the objective.
    ValueError if the name is taken, TypeError if the class is no BaseLanguageModel.
    """

    def register(cls: C) -> C:
        if name in MODEL_REGISTRY:
            raise ConfigError(
                f"Architecture '{name}' is already registered, as {MODEL_REGISTRY[name].__name__}; choose another name"
            )
        if not (isinstance(cls, type) and issubclass(cls, BaseLanguageModel)):
            raise TypeError(f"register_architecture: {cls!r} must inherit from BaseLanguageModel")
        if not issubclass(cls, PlaitLanguageModel):
            register_own(name, cls)
        MODEL_REGISTRY[name] = cls
        _LOGGER.info("Registered architecture %s: %s", name, cls.__name__)
        return cls

    return register


def get_registered_architectures() -> list[str]:
    """The names of all architectures, in the order of their registration."""
    return list(MODEL_REGISTRY)


def create_model_from_config(config: Any) -> BaseLanguageModel:
    """The model of an ExperimentConfig, with new weights; ConfigError, a ValueError, for an unknown architecture."""
    name = config.model.architecture
    if name not in MODEL_REGISTRY:
        raise ConfigError(
            f"Unknown architecture: '{name}'; there are {', '.join(MODEL_REGISTRY)}{nearest(name, MODEL_REGISTRY)}"
        )
    model = MODEL_REGISTRY[name].from_config(config)
    _LOGGER.info("Created a %s with %d parameters", name, model.get_parameter_count())
    return model
