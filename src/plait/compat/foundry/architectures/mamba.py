"""Mamba: the same module on every device; what runs its scan is Plait's choice (``plait doctor``)."""

from __future__ import annotations

from plait.compat.foundry.architectures.face import PlaitLanguageModel
from plait.compat.foundry.architectures.registry import register_architecture

# Foundry asks whether mamba-ssm is there, to take another module without it. Here nothing depends on it.
MAMBA_SSM_AVAILABLE = False


@register_architecture("mamba")
class MambaModel(PlaitLanguageModel):
    """Embedding, ``n_layers`` of LayerNorm and Mamba with residuals, LayerNorm, an output tied to the embedding."""

    architectures = ("mamba",)

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dropout: float = 0.0,
    ) -> None:
        section = {
            "d_model": d_model,
            "n_layers": n_layers,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "dropout": dropout,
        }
        super().__init__(vocab_size, {"architecture": "mamba", "mamba": section})

    @property
    def d_model(self) -> int:
        """Width of the hidden states."""
        return self.model.config.d_model

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.model.blocks)

    @property
    def d_state(self) -> int:
        """States of a channel."""
        return int(self._option("d_state"))

    @property
    def d_conv(self) -> int:
        """Taps of the convolution."""
        return int(self._option("d_conv"))

    @property
    def expand(self) -> int:
        """Inner width as a multiple of d_model."""
        return int(self._option("expand"))

    def _option(self, name: str) -> float:
        value: float = self.model.config.layers()[0].options.model_dump()[name]
        return value
