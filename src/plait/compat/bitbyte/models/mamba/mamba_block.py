"""BitByte's block of Mamba, in the place of one of attention."""

from __future__ import annotations

from plait.compat.bitbyte.models.block import ByteBlock
from plait.compat.bitbyte.models.mamba.mamba_ssm import MambaSSM
from plait.config.originals.bitbyte import Sizes
from plait.mixers.mamba import Mamba


class MambaBlock(ByteBlock):
    """RMS norm, MambaSSM, residual; RMS norm, SwiGLU of width d_ff, residual."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        act_quant: bool = True,
    ) -> None:
        sizes = Sizes(
            d_model=d_model, d_ff=d_ff, d_state=d_state, d_conv=d_conv, expand=expand, act_quant=act_quant
        )
        super().__init__(sizes, "mamba")

    @property
    def ssm(self) -> MambaSSM:
        """The mixer."""
        assert isinstance(self.mixer, Mamba)
        return MambaSSM.over(self.mixer)
