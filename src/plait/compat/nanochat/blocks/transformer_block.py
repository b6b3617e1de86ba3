"""The transformer's block."""

from __future__ import annotations

from plait.compat.nanochat.blocks.mixer_block import MixerBlock
from plait.mixers.contract import Mixer


class TransformerBlock(MixerBlock):
    """x + attention(norm(x)), then x + mlp(norm(x)): RoPE, QK norm, grouped queries; squared ReLU."""

    kind = "attention"

    @property
    def attn(self) -> Mixer:
        """The attention."""
        return self.block.mixer
