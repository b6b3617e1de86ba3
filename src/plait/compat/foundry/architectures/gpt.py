"""GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.compat.foundry.architectures.face import PlaitLanguageModel
from plait.compat.foundry.architectures.registry import register_architecture
from plait.compat.foundry.config import TransformerModelConfig


@register_architecture("gpt2")
class GPT2Model(PlaitLanguageModel):
    """A GPT-2 of a ``transformer`` section; it has positions for ``max_sequence_length`` tokens."""

    architectures = ("gpt2",)

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerModelConfig | Mapping[str, Any],
        max_sequence_length: int = 1024,
    ) -> None:
        super().__init__(
            vocab_size, {"architecture": "gpt2", "transformer": transformer}, max_sequence_length
        )
