"""Floor 0: what a run is, as data. A strict schema, the table of mixers, the pattern language; never torch.

Its names are loaded when first used, so that importing an error class does not import the schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.config.lazy import lazy_names

if TYPE_CHECKING:
    from plait.config.errors import ConfigError as ConfigError
    from plait.config.errors import PlaitError as PlaitError
    from plait.config.load import config_yaml as config_yaml
    from plait.config.load import load_config as load_config
    from plait.config.load import save_config as save_config
    from plait.config.pattern import parse_pattern as parse_pattern
    from plait.config.schema import Config as Config
    from plait.config.schema import ModelConfig as ModelConfig
    from plait.config.table import register_mixer as register_mixer
    from plait.config.table import temporary_mixer as temporary_mixer

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Config": "plait.config.schema:Config",
        "ConfigError": "plait.config.errors:ConfigError",
        "ModelConfig": "plait.config.schema:ModelConfig",
        "PlaitError": "plait.config.errors:PlaitError",
        "config_yaml": "plait.config.load:config_yaml",
        "load_config": "plait.config.load:load_config",
        "parse_pattern": "plait.config.pattern:parse_pattern",
        "register_mixer": "plait.config.table:register_mixer",
        "save_config": "plait.config.load:save_config",
        "temporary_mixer": "plait.config.table:temporary_mixer",
    },
)
