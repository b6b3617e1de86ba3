"""BitByte's Mamba: the block, its mixer, and kernels by themselves."""

from plait.compat.bitbyte.models.mamba.mamba_block import MambaBlock
from plait.compat.bitbyte.models.mamba.mamba_ssm import MambaSSM
from plait.compat.bitbyte.models.mamba.ssm import S4Kernel, SelectiveSSM

__all__ = ["MambaBlock", "MambaSSM", "S4Kernel", "SelectiveSSM"]
