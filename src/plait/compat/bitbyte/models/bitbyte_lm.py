"""BitByte's language model of attention, and the hybrid with Mamba."""

from __future__ import annotations

from plait.compat.bitbyte.models.language_model import ByteLM
from plait.config.originals.bitbyte import Sizes


class BitByteLM(ByteLM):
    """Bytes through ``n_layer`` Blocks, an RMS norm, and an output tied to the embedding."""

    family = "bitbyte"

    def __init__(
        self,
        vocab_size: int = 256,
        n_layer: int = 24,
        d_model: int = 1536,
        n_head: int = 24,
        d_ff: int = 4096,
        n_kv_head: int | None = None,
        rope_base: float = 10000.0,
        act_quant: bool = True,
    ) -> None:
        sizes = Sizes(
            vocab_size=vocab_size,
            n_layer=n_layer,
            d_model=d_model,
            n_head=n_head,
            d_ff=d_ff,
            n_kv_head=n_kv_head,
            rope_base=rope_base,
            act_quant=act_quant,
        )
        super().__init__(sizes)


class HybridLM(ByteLM):
    """Bytes through Blocks and MambaBlocks, by default Mamba in the first half; then as BitByteLM.

    ``pattern`` names the blocks, first to last: ``["mamba", "mamba", "attention"]``, or as in Plait ``"M*2 T"``.
    """

    family = "hybrid"

    def __init__(
        self,
        vocab_size: int = 256,
        n_layer: int = 24,
        d_model: int = 1536,
        n_head: int = 24,
        d_ff: int = 4096,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        n_kv_head: int | None = None,
        rope_base: float = 10000.0,
        act_quant: bool = True,
        pattern: str | list[str] | None = None,
    ) -> None:
        sizes = Sizes(
            vocab_size=vocab_size,
            n_layer=n_layer,
            d_model=d_model,
            n_head=n_head,
            d_ff=d_ff,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            n_kv_head=n_kv_head,
            rope_base=rope_base,
            act_quant=act_quant,
        )
        super().__init__(sizes, pattern)
