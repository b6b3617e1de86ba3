"""What every block of a GPT is: a module from (B, T, n_embd) to the same, with a dict of what it may need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class BaseBlock(nn.Module, ABC):
    """A whole layer, norms and residuals included; subclass it and ``register_block`` it to have it in a GPT.

    It is built as ``cls(config, layer_idx)`` from a GPTConfig. Inside of a GPT ``context`` holds "cos_sin", the
    rotary tables of the positions of x, (1, T, 1, head width / 2) each, and "kv_cache", None: a block of your own
    keeps no state, so generation runs it over the whole text for every token.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    @abstractmethod
    def forward(self, x: Tensor, context: dict[str, Any] | None = None) -> Tensor:
        """x (B, T, n_embd) -> the same shape."""

    def get_num_params(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def get_block_type(self) -> str:
        """The name of the block's class."""
        return type(self).__name__
