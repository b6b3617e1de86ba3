"""The interface of every architecture: what a language model of Model Foundry must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from plait.config.errors import CheckpointError
from plait.formats.foreign import read_file

WEIGHTS, MODEL_TYPE = "pytorch_model.bin", "model_type.txt"


@dataclass
class ModelOutput:
    """What a forward gives, by attribute or by key; what it does not give is None."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, V)
    hidden_states: Tensor | None = None  # (B, T, d), before the output map
    attentions: Tensor | None = None

    def __getitem__(self, key: str) -> Tensor | None:
        if key not in self:
            raise KeyError(f"{key!r} is no output; there are {', '.join(f.name for f in fields(self))}")
        value: Tensor | None = getattr(self, key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in {f.name for f in fields(self)}


class BaseLanguageModel(nn.Module, ABC):
    """Base class of all architectures, those of your own among them (``register_architecture``)."""

    @abstractmethod
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        """Ids (B, T), a mask that is 0 at pads, and unshifted labels (-100 is ignored) to loss and logits."""

    @abstractmethod
    def get_input_embeddings(self) -> nn.Module:
        """The embedding layer of the token ids."""

    @abstractmethod
    def resize_token_embeddings(self, new_num_tokens: int) -> None:
        """Give the model another vocabulary; ids that stay keep their vectors."""

    @property
    @abstractmethod
    def model_type(self) -> str:
        """The name of the architecture."""

    @property
    @abstractmethod
    def supports_generation(self) -> bool:
        """Whether it predicts the next token: no output depends on a later one."""

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The model that an ExperimentConfig describes."""
        raise TypeError(f"{cls.__name__} defines no from_config(config)")

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write the weights and the name of the architecture into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / WEIGHTS)
        (folder / MODEL_TYPE).write_text(self.model_type, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, model_directory: str | PathLike[str], **arguments: Any) -> Self:
        """The model of a folder; ``arguments`` are those of the constructor, which the folder does not hold."""
        tensors = read_file(Path(model_directory) / WEIGHTS)
        model = cls(**arguments)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            line = " ".join(str(error).split())
            raise CheckpointError(f"{model_directory} is of another model: {line}") from None
        return model.eval()

    def get_parameter_count(self) -> int:
        """The number of trainable values; a tied weight counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def get_memory_footprint(self) -> dict[str, int]:
        """Bytes of ``parameters``, of ``buffers``, and in ``total``."""
        sizes = {
            "parameters": sum(p.numel() * p.element_size() for p in self.parameters()),
            "buffers": sum(b.numel() * b.element_size() for b in self.buffers()),
        }
        return {**sizes, "total": sum(sizes.values())}
