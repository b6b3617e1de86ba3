"""The first layer: token ids to vectors, with learned positions, token types, norm, scale and dropout as options."""

from __future__ import annotations

import math

from torch import Tensor, nn

from plait.config.schema import EmbeddingConfig
from plait.nn.norm import make_norm


class TokenTable(nn.Embedding):
    """One row for every id of the vocabulary; ``resize_token_embeddings`` finds such tables and grows them all.

    Rows are drawn with standard deviation ``std``, from a normal or a uniform distribution.
    """

    std: float = 0.02
    uniform: bool = False

    def __init__(self, rows: int, width: int, *, std: float = 0.02, uniform: bool = False) -> None:
        super().__init__(rows, width)
        self.std = std
        self.uniform = uniform
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all rows."""
        self.draw(self.weight)

    def draw(self, rows: Tensor) -> None:
        """Overwrite ``rows`` (n, width) with new ones."""
        if self.uniform:
            bound = math.sqrt(3) * self.std
            nn.init.uniform_(rows, -bound, bound)
        else:
            nn.init.normal_(rows, std=self.std)


class Embedding(nn.Module):
    """Ids (..., T) to vectors (..., T, width); positions and token types are added before the norm (as in BERT)."""

    def __init__(self, config: EmbeddingConfig, vocab_rows: int, width: int) -> None:
        super().__init__()
        self.scale = config.scale
        self.tokens = TokenTable(vocab_rows, width)
        self.positions = nn.Embedding(config.max_positions, width) if config.position == "learned" else None
        self.types = nn.Embedding(config.token_types, width) if config.token_types else None
        self.norm = make_norm(config.norm, width)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self, std: float) -> None:
        """Draw every table from N(0, std)."""
        self.tokens.std = std
        self.tokens.reset_parameters()
        for table in (self.positions, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=std)

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor | None = None) -> Tensor:
        """tokens, positions and token_types: (..., T) -> (..., T, width); absent token types count as type 0.

        Tokens are ids, or vectors (..., T, width) that stand in the place of the table's rows.
        """
        x = tokens if tokens.is_floating_point() else self.tokens(tokens)
        if self.scale is not None:
            x = x * self.scale
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.types is not None:
            x = x + (self.types.weight[0] if token_types is None else self.types(token_types))
        return self.dropout(self.norm(x))
