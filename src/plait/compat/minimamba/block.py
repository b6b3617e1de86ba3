"""MambaBlock: a Plait block of norm, mixer and residual; by itself, or one of a model's."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from plait.compat.minimamba.build import backend, cast, model_config
from plait.compat.minimamba.config import BaseMambaConfig
from plait.compat.minimamba.mixers import MixerClass
from plait.compat.minimamba.s6 import S6, refuse_params
from plait.mixers.adapter import ModuleMixer
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba
from plait.models.block import Block


class MambaBlock(nn.Module):
    """x + mixer(norm(x)) on (B, L, d_model)."""

    def __init__(self, config: BaseMambaConfig, mixer_cls: MixerClass | None = None) -> None:
        super().__init__()
        self.config = config
        layer = model_config(config, "features", mixer_cls).layers()[0]
        with torch.device(config.device or torch.get_default_device()):
            self.block = Block(layer, config.d_model, causal=True, index=0)
        cast(self.block, config)

    @classmethod
    def over(cls, block: Block, config: BaseMambaConfig) -> Self:
        """The face of a model's own block."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.config, face.block = config, block
        return face

    @property
    def norm(self) -> nn.Module:
        """The norm before the mixer."""
        return self.block.norm1

    @property
    def mixer(self) -> nn.Module:
        """An S6, or what ``mixer_cls`` made."""
        mixer = self.block.mixer
        if isinstance(mixer, ModuleMixer):
            return mixer.module
        assert isinstance(mixer, Mamba)
        return S6.over(mixer)

    def forward(self, hidden_states: Tensor, inference_params: None = None) -> Tensor:
        """(B, L, d_model), whole sequences -> the same shape."""
        refuse_params(inference_params)
        rows, length = hidden_states.shape[:2]
        with backend(self.config):
            y, _ = self.block(hidden_states, Layout.dense(rows, length, device=hidden_states.device))
        result: Tensor = y
        return result
