"""Value embeddings: attention's values take on a vector that the token's id alone decides, through a gate.

    v_t = v_t + 3 sigmoid(W x_t[:C]) * table[id_t]        one gate for each key/value head

Sources: ResFormer (arXiv 2410.17897), in the form that nanochat of July 2026 gives it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.config.errors import BuildError, DataError
from plait.nn.embedding import TokenTable
from plait.nn.roles import Role

_MOST = 3.0  # a gate that sees nothing is at half of it, a little above one


class ValueEmbedding(nn.Module):
    """What is added to the values (..., Hk, P): a row of a table of ``rows`` ids, gated by C channels of x."""

    roles: ClassVar = {"gate": Role("matrix", fp32=True)}

    def __init__(
        self, rows: int, d_model: int, n_kv_head: int, headdim: int, channels: int, where: str
    ) -> None:
        super().__init__()
        if channels > d_model:
            raise BuildError(f"{where}: value_gate_channels {channels} is more than d_model {d_model}")
        if rows == 0:
            raise BuildError(
                f"{where}: value_embedding needs the size of the vocabulary; build it in a Model"
            )
        self.where = where
        self.headdim = headdim
        # drawn as the projection to values is that has the same size of outputs
        self.table = TokenTable(rows, n_kv_head * headdim, std=d_model**-0.5, uniform=True)
        self.gate = nn.Parameter(torch.empty(n_kv_head, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates a little above their middle; the table draws its own rows."""
        nn.init.uniform_(self.gate, 0.0, 0.02)

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """x (..., d_model), ids (...) -> (..., Hk, P) in x's dtype; DataError without ids."""
        if ids is None:
            raise DataError(
                f"{self.where}: value_embedding looks at token ids, but the model was given vectors; give input_ids"
            )
        gate = _MOST * torch.sigmoid(F.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype)))
        return gate[..., None] * self.table(ids).to(x.dtype).unflatten(-1, (-1, self.headdim))
