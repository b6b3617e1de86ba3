"""The one schema of a run. Everything has a default; a config, written out, runs the same run again."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from plait.config.block import BlockConfig, LinearConfig, MLPConfig, NormConfig, ResidualConfig
from plait.config.data import DataConfig, TokenizerConfig
from plait.config.errors import ConfigError
from plait.config.init import InitConfig
from plait.config.model import EmbeddingConfig, HeadConfig, LayerConfig, ModelConfig
from plait.config.section import Section
from plait.config.text import plain
from plait.config.training import TrainingConfig

__all__ = [
    "BlockConfig",
    "Config",
    "DataConfig",
    "EmbeddingConfig",
    "HeadConfig",
    "InitConfig",
    "LayerConfig",
    "LinearConfig",
    "MLPConfig",
    "ModelConfig",
    "NormConfig",
    "ResidualConfig",
    "TokenizerConfig",
    "TrainingConfig",
]


class Config(Section):
    """A run: a model, its tokenizer, its data, its training."""

    experiment_name: str = Field("plait", description="names the run and its folder")
    model: ModelConfig = Field(default_factory=ModelConfig, description="what is built")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="how text becomes ids")
    data: DataConfig = Field(default_factory=DataConfig, description="what it is trained on")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="how")

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> Config:
        if not re.fullmatch(r"[\w][\w.+=@ -]*", self.experiment_name):
            raise ConfigError(
                "it names a folder: letters and digits, and any of ._-+=@ after the first; "
                f"got {self.experiment_name!r}",
                ("experiment_name",),
            )
        return self

    @property
    def run_folder(self) -> str:
        """Where the run is written: ``training.out``, or ``runs/<experiment_name>``."""
        return self.training.out or f"runs/{self.experiment_name}"

    def to_dict(self) -> dict[str, Any]:
        """Every value as plain data that YAML and JSON can hold and that validates to an equal config."""
        values: dict[str, Any] = plain(self.model_dump())
        return values
