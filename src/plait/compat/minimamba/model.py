"""MiniMamba's oldest class of a language model."""

from __future__ import annotations

from plait.compat.minimamba.models import MambaForCausalLM
from plait.config.schema import ModelConfig


class Mamba(MambaForCausalLM):
    """A language model that is always tied, without a bias in the output, and with an RMS norm at the end."""

    def _described(self) -> ModelConfig:
        described = super()._described()
        norm = {"kind": "rms", "eps": described.norm.eps}
        return described.replace(head={"kind": "lm", "tie": True}, final_norm=norm)
