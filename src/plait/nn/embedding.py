"""The first layer: token ids to vectors, with learned positions, token types, norm, scale and dropout as options."""

from __future__ import annotations

from torch import Tensor, nn

from plait.config.schema import EmbeddingConfig
from plait.nn.norm import make_norm


class Embedding(nn.Module):
    """Ids (..., T) to vectors (..., T, width); positions and token types are added before the norm (as in BERT)."""

    def __init__(self, config: EmbeddingConfig, vocab_rows: int, width: int) -> None:
        super().__init__()
        self.scale = config.scale
        self.tokens = nn.Embedding(vocab_rows, width)
        self.positions = nn.Embedding(config.max_positions, width) if config.position == "learned" else None
        self.types = nn.Embedding(config.token_types, width) if config.token_types else None
        self.norm = make_norm(config.norm, width)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self, std: float) -> None:
        """Draw every table from N(0, std)."""
        for table in (self.tokens, self.positions, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=std)

    def forward(self, ids: Tensor, positions: Tensor, token_types: Tensor | None = None) -> Tensor:
        """ids, positions and token_types: (..., T) -> (..., T, width); absent token types count as type 0."""
        x = self.tokens(ids)
        if self.scale is not None:
            x = x * self.scale
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.types is not None:
            x = x + (self.types.weight[0] if token_types is None else self.types(token_types))
        return self.dropout(self.norm(x))
