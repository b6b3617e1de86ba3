"""BitByte's blocks: Plait's block of norm, mixer, norm and SwiGLU; by itself, or one of a model's."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from plait.config.originals.bitbyte import Sizes, model_section
from plait.config.schema import ModelConfig
from plait.mixers.contract import Layout, Mixer
from plait.models.block import Block as PlaitBlock
from plait.nn.mlp import MLP


class ByteBlock(nn.Module):
    """x + mixer(n1(x)), then x + mlp(n2(x)), on (B, T, d_model)."""

    def __init__(self, sizes: Sizes, kind: str) -> None:
        super().__init__()
        (layer,) = ModelConfig.model_validate(model_section(sizes, [kind])).layers()
        self.block = PlaitBlock(layer, sizes.d_model, causal=True, index=0)

    @classmethod
    def over(cls, block: PlaitBlock) -> Self:
        """The face of a model's own block."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.block = block
        return face

    @property
    def n1(self) -> nn.Module:
        """The norm before the mixer."""
        return self.block.norm1

    @property
    def n2(self) -> nn.Module:
        """The norm before the MLP."""
        return self.block.norm2

    @property
    def mixer(self) -> Mixer:
        """What mixes along time."""
        return self.block.mixer

    @property
    def mlp(self) -> MLP:
        """The SwiGLU."""
        assert self.block.mlp is not None
        return self.block.mlp

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d_model), whole sequences -> the same shape."""
        y: Tensor
        y, _ = self.block(x, Layout.dense(x.shape[0], x.shape[1], device=x.device))
        return y


class Block(ByteBlock):
    """The block of causal attention, by rotated queries and keys."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_ff: int,
        n_kv_head: int | None = None,
        rope_base: float = 10000.0,
        act_quant: bool = True,
    ) -> None:
        sizes = Sizes(
            d_model=d_model,
            n_head=n_head,
            d_ff=d_ff,
            n_kv_head=n_kv_head,
            rope_base=rope_base,
            act_quant=act_quant,
        )
        super().__init__(sizes, "attention")

    @property
    def attn(self) -> Mixer:
        """The attention."""
        return self.mixer
