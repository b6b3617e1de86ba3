"""MiniMamba: replace the import root ``minimamba`` by ``plait.compat.minimamba``.

config      BaseMambaConfig, MambaLMConfig, MambaClassificationConfig, MambaConfig, InferenceParams
models      MambaForCausalLM, MambaForSequenceClassification, MambaForFeatureExtraction, Mamba
core        MambaEncoder, MambaEmbedding, MambaLMHead, MambaClassificationHead
block, s6, norm, model: MambaBlock, S6, RMSNorm, MambaLegacy

Its weights: ``MambaForCausalLM.from_original``, or ``plait convert SRC DST --from minimamba``.
"""

from plait.compat.minimamba.block import MambaBlock
from plait.compat.minimamba.config import (
    BaseMambaConfig,
    InferenceParams,
    MambaClassificationConfig,
    MambaConfig,
    MambaLMConfig,
)
from plait.compat.minimamba.core import (
    MambaClassificationHead,
    MambaEmbedding,
    MambaEncoder,
    MambaLMHead,
)
from plait.compat.minimamba.model import Mamba as MambaLegacy
from plait.compat.minimamba.models import (
    Mamba,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
)
from plait.compat.minimamba.norm import RMSNorm
from plait.compat.minimamba.s6 import S6

__version__ = "1.0.0"  # of MiniMamba, whose interface this is

__all__ = [
    "S6",
    "BaseMambaConfig",
    "InferenceParams",
    "Mamba",
    "MambaBlock",
    "MambaClassificationConfig",
    "MambaClassificationHead",
    "MambaConfig",
    "MambaEmbedding",
    "MambaEncoder",
    "MambaForCausalLM",
    "MambaForFeatureExtraction",
    "MambaForSequenceClassification",
    "MambaLMConfig",
    "MambaLMHead",
    "MambaLegacy",
    "RMSNorm",
]
