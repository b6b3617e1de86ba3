"""Architectures by name: Foundry's six are registered here; ``register_architecture`` adds your own."""

from plait.compat.foundry.architectures.base import BaseLanguageModel, ModelOutput
from plait.compat.foundry.architectures.bert import BERTModel
from plait.compat.foundry.architectures.gpt import GPT2Model
from plait.compat.foundry.architectures.mamba import MambaModel
from plait.compat.foundry.architectures.registry import (
    MODEL_REGISTRY,
    create_model_from_config,
    get_registered_architectures,
    register_architecture,
)
from plait.compat.foundry.architectures.rnn import GRUModel, LSTMModel, RNNLanguageModel, VanillaRNNModel

__all__ = [
    "MODEL_REGISTRY",
    "BERTModel",
    "BaseLanguageModel",
    "GPT2Model",
    "GRUModel",
    "LSTMModel",
    "MambaModel",
    "ModelOutput",
    "RNNLanguageModel",
    "VanillaRNNModel",
    "create_model_from_config",
    "get_registered_architectures",
    "register_architecture",
]
