"""BitByte's models and their parts."""

from plait.compat.bitbyte.models.bitbyte_lm import BitByteLM, HybridLM
from plait.compat.bitbyte.models.bitlinear import BitLinear
from plait.compat.bitbyte.models.block import Block
from plait.compat.bitbyte.models.language_model import ByteLM
from plait.compat.bitbyte.models.mamba import MambaBlock, MambaSSM, S4Kernel, SelectiveSSM
from plait.compat.bitbyte.models.mamba_mlm import MambaMLM

__all__ = [
    "BitByteLM",
    "BitLinear",
    "Block",
    "ByteLM",
    "HybridLM",
    "MambaBlock",
    "MambaMLM",
    "MambaSSM",
    "S4Kernel",
    "SelectiveSSM",
]
