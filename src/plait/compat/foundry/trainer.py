"""Model Foundry's Trainer: an experiment becomes a run of Plait's one trainer."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from plait.compat.foundry.architectures import (
    MODEL_REGISTRY,
    BaseLanguageModel,
)
from plait.compat.foundry.architectures.face import PlaitLanguageModel, architecture_of
from plait.compat.foundry.config import ExperimentConfig
from plait.compat.foundry.logging_utils import close_logging, console_level, setup_logging
from plait.compat.foundry.metadata import checkpoint_metadata
from plait.config.errors import PlaitError
from plait.config.originals.foundry import run_values
from plait.config.schema import Config
from plait.tokenizers.base import Tokenizer
from plait.training import TrainResult
from plait.training import train as run


def run_config(config: ExperimentConfig, base_dir: str | Path = ".") -> Config:
    """The run that an experiment describes, its paths taken from ``base_dir``; ConfigError for what cannot be done."""
    values = run_values(config)
    base = Path(base_dir)

    def below(section: str, name: str) -> None:
        value = values[section][name]
        if value is not None and base != Path("."):
            values[section][name] = str(base / value)

    below("data", "train")
    below("data", "validation")
    below("tokenizer", "path")
    if values["training"]["out"] is None:
        values["training"]["out"] = str(Path("runs") / config.experiment_name)
    below("training", "out")
    return Config.model_validate(values)


class Trainer:
    """``Trainer(config, base_dir).train()``; afterwards ``model``, ``tokenizer``, ``global_step`` and ``result``.

    Paths of the experiment are relative to ``base_dir``. With ``training.resume_from_checkpoint`` the run goes on
    with its newest checkpoint, or begins if there is none. PlaitError for whatever goes wrong.
    """

    def __init__(self, config: ExperimentConfig, base_dir: str | Path = ".") -> None:
        self.config = config
        self.base_dir = Path(base_dir)
        self.run = run_config(config, base_dir)
        self.result: TrainResult | None = None

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.run.run_folder)

    def train(self) -> TrainResult:
        """Train to the end and return how it ended; its course is in ``output_dir/metrics.jsonl``."""
        settings, name = self.config.logging, self.config.experiment_name
        shown = console_level(settings)
        logger = logging.getLogger("trainer")
        if os.environ.get("RANK", "0") == "0":  # under torchrun one process writes
            logger = setup_logging("trainer", name, self.base_dir / settings.dir, shown, settings)
        resume = "auto" if self.config.training.resume_from_checkpoint else None
        logger.info("Training %s in %s", name, self.output_dir)
        try:
            done = self.result = run(
                self.run,
                resume=resume,
                quiet=shown > logging.INFO,
                metadata=partial(checkpoint_metadata, self.config, self.run),
            )
            logger.info(
                "Ended by %s at step %d after %d tokens: %s", done.stopped, done.step, done.tokens, done.run
            )
        except PlaitError as error:
            logger.error("Training failed: %s", error)
            raise
        finally:
            close_logging(logger)
        return done

    @property
    def model(self) -> BaseLanguageModel | None:
        """The trained model; None before ``train``."""
        if self.result is None:
            return None
        model = self.result.model
        face: Any = MODEL_REGISTRY[self.config.model.architecture]
        if issubclass(face, PlaitLanguageModel):
            assert architecture_of(model) == self.config.model.architecture
            return face.over(model)
        own: Any = model.blocks[0].mixer
        module: BaseLanguageModel = own.module
        return module

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the run; None before ``train``."""
        return None if self.result is None else self.result.tokenizer

    @property
    def global_step(self) -> int:
        """Updates of the weights so far."""
        return 0 if self.result is None else self.result.step
