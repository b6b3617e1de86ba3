"""BitByte's language model of Mamba."""

from __future__ import annotations

from plait.compat.bitbyte.models.language_model import ByteLM
from plait.config.originals.bitbyte import Sizes


class MambaMLM(ByteLM):
    """Bytes through ``n_layer`` MambaBlocks, a LayerNorm, and an output tied to the embedding."""

    family = "mamba"

    def __init__(
        self,
        vocab_size: int = 256,
        n_layer: int = 24,
        d_model: int = 1536,
        d_ff: int = 4096,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        act_quant: bool = True,
    ) -> None:
        sizes = Sizes(
            vocab_size=vocab_size,
            n_layer=n_layer,
            d_model=d_model,
            d_ff=d_ff,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            act_quant=act_quant,
        )
        super().__init__(sizes)
