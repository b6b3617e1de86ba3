"""Model Foundry's config classes; ``ExperimentConfig(**yaml)`` validates, every field has a default."""

from __future__ import annotations

from pathlib import Path

from plait.config.errors import ConfigError
from plait.config.load import read_config_file
from plait.config.originals.foundry_schema import (
    BERTSpecificConfig,
    DataConfig,
    ExperimentConfig,
    LoggingConfig,
    MambaModelConfig,
    ModelConfig,
    RNNModelConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerModelConfig,
)

__all__ = [
    "BERTSpecificConfig",
    "DataConfig",
    "ExperimentConfig",
    "LoggingConfig",
    "MambaModelConfig",
    "ModelConfig",
    "RNNModelConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TransformerModelConfig",
    "load_experiment",
]


def load_experiment(path: str | Path) -> ExperimentConfig:
    """The experiment in a file; ConfigError, with the file's name, for whatever is wrong in it."""
    values = read_config_file(Path(path))
    try:
        return ExperimentConfig.model_validate(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
