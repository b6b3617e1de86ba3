"""A block of Plait's own under nanochat's interface; by itself, or one of a model's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from plait.compat.nanochat.blocks.base import BaseBlock
from plait.compat.nanochat.gpt_config import values_of
from plait.compat.nanochat.rotary import check_tables
from plait.config.errors import BuildError, nearest
from plait.config.originals.nanochat import model_section
from plait.config.schema import ModelConfig
from plait.mixers.attention import Attention
from plait.mixers.contract import Layout, Mixer
from plait.models.block import Block

_CONTEXT = ("cos_sin", "kv_cache", "inference_params")


class MixerBlock(BaseBlock):
    """Norm, mixer, residual, then perhaps norm, MLP, residual, with a mixer of any kind of Plait's table."""

    kind: str

    def __init__(
        self, config: Any, layer_idx: int, *, kind: str | None = None, block: Block | None = None
    ) -> None:
        super().__init__(config, layer_idx)
        if kind is not None:
            self.kind = kind
        self.block = _new_block(config, self.kind, layer_idx) if block is None else block

    @property
    def mixer(self) -> Mixer:
        """What mixes along time."""
        return self.block.mixer

    @property
    def mlp(self) -> nn.Module | None:
        """The MLP, or None."""
        return self.block.mlp

    def forward(self, x: Tensor, context: dict[str, Any] | None = None) -> Tensor:
        """x (B, T, n_embd), whole sequences from their first token on -> the same shape.

        ``context`` may hold "cos_sin", which must be the tables of these positions, and "kv_cache": None. A cache is
        the whole model's: give it to the GPT.
        """
        for key, value in (context or {}).items():
            if key not in _CONTEXT:
                raise BuildError(
                    f"the context has a {key!r}, which no block knows{nearest(key, _CONTEXT)}; it may hold cos_sin"
                )
            if key != "cos_sin" and value is not None:
                raise BuildError(
                    f"{key}: a block alone keeps no state; give a KVCache to the GPT, for all its blocks"
                )
            if key == "cos_sin" and value is not None and isinstance(self.mixer, Attention):
                check_tables(value, x.shape[1], self.mixer.headdim)
        y: Tensor
        y, _ = self.block(x, Layout.dense(x.shape[0], x.shape[1], device=x.device))
        return y

    def get_block_type(self) -> str:
        """The name of the class, or the kind of mixer if no class was written for it."""
        return self.kind if type(self) is MixerBlock else super().get_block_type()


def _new_block(config: Any, kind: str, layer_idx: int) -> Block:
    values = {**values_of(config), "n_layer": 1, "block_pattern": [kind]}
    (layer,) = ModelConfig.model_validate(model_section(values)).layers()
    return Block(layer, values["n_embd"], causal=True, index=layer_idx, vocab_rows=values["vocab_size"])
