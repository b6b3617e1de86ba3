"""Plait: language models whose layers are any mix of Mamba, attention and recurrent layers.

The names below are loaded when first used: importing plait does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.config.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from plait.api import build as build
    from plait.api import load as load
    from plait.api import train as train
    from plait.config.errors import PlaitError as PlaitError
    from plait.config.load import load_config as load_config
    from plait.config.load import save_config as save_config
    from plait.config.schema import Config as Config
    from plait.config.schema import ModelConfig as ModelConfig
    from plait.config.table import register_mixer as register_mixer

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Cache": "plait.models:Cache",
        "Config": "plait.config.schema:Config",
        "Model": "plait.models:Model",
        "ModelConfig": "plait.config.schema:ModelConfig",
        "PlaitError": "plait.config.errors:PlaitError",
        "build": "plait.api:build",
        "generate": "plait.inference.generate:generate",
        "load": "plait.api:load",
        "load_config": "plait.config.load:load_config",
        "load_tokenizer": "plait.tokenizers:load_tokenizer",
        "register_mixer": "plait.config.table:register_mixer",
        "save_config": "plait.config.load:save_config",
        "train": "plait.api:train",
        "use_backend": "plait.ops.dispatch:use_backend",
    },
)
