"""BERT, for masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.compat.foundry.architectures.face import PlaitLanguageModel
from plait.compat.foundry.architectures.registry import register_architecture
from plait.compat.foundry.config import TransformerModelConfig


@register_architecture("bert")
class BERTModel(PlaitLanguageModel):
    """A BERT of a ``transformer`` section, with ``type_vocab_size`` token types."""

    architectures = ("bert",)

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerModelConfig | Mapping[str, Any],
        max_sequence_length: int = 512,
        type_vocab_size: int = 2,
    ) -> None:
        config = {
            "architecture": "bert",
            "transformer": transformer,
            "bert": {"type_vocab_size": type_vocab_size},
        }
        super().__init__(vocab_size, config, max_sequence_length)
