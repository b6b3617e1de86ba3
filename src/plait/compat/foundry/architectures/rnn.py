"""LSTM, GRU and plain RNN, reading in one direction (causal) or in both (masked tokens)."""

from __future__ import annotations

from typing import ClassVar

from plait.compat.foundry.architectures.face import PlaitLanguageModel
from plait.compat.foundry.architectures.registry import register_architecture
from plait.config.errors import ConfigError


class RNNLanguageModel(PlaitLanguageModel):
    """Embedding, ``num_layers`` recurrent layers with dropout after each, an output with a bias."""

    architectures: ClassVar[tuple[str, ...]] = ("lstm", "gru", "rnn")
    cell: ClassVar[str | None] = None  # the one of a subclass

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        rnn_type: str | None = None,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        kind = rnn_type or self.cell or "lstm"
        if kind not in self.architectures:
            raise ConfigError(
                f"rnn_type must be {' or '.join(map(repr, self.architectures))}, got {kind!r}", ("rnn_type",)
            )
        section = {
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bidirectional": bidirectional,
            "dropout": dropout,
        }
        super().__init__(vocab_size, {"architecture": kind, "rnn": section})

    @property
    def rnn_type(self) -> str:
        """The kind of cell."""
        return self.model_type

    @property
    def bidirectional(self) -> bool:
        """Whether it reads in both directions."""
        return not self.model.config.causal

    @property
    def embedding_size(self) -> int:
        """Width of the token vectors."""
        return self.embedding.embedding_dim

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state of one direction."""
        return self.model.d_out // (2 if self.bidirectional else 1)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.model.blocks)


@register_architecture("lstm")
class LSTMModel(RNNLanguageModel):
    """An LSTM language model."""

    architectures = ("lstm",)
    cell = "lstm"


@register_architecture("gru")
class GRUModel(RNNLanguageModel):
    """A GRU language model."""

    architectures = ("gru",)
    cell = "gru"


@register_architecture("rnn")
class VanillaRNNModel(RNNLanguageModel):
    """A plain (tanh) RNN language model."""

    architectures = ("rnn",)
    cell = "rnn"
