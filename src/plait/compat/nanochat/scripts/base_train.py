"""Pretraining: nanochat's settings, as a config file and options, become a run of ``plait train``.

    torchrun --standalone --nproc_per_node=8 -m plait.compat.nanochat.scripts.base_train configs/mamba_d20.py
    python -m plait.compat.nanochat.scripts.base_train --depth=4 --data.train=path/to/text --training.steps=100

Text, tokenizer and checkpoints are in nanochat's folder (``common.get_base_dir``), unless --data.train,
--tokenizer.path or --training.out say otherwise; a tokenizer that is not there is trained on the text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from pydantic import Field

from plait.compat.nanochat.common import get_base_dir, print0, run_script
from plait.compat.nanochat.configurator import CommandLine, read_command_line
from plait.compat.nanochat.gpt_config import gpt_config_of
from plait.config.errors import ConfigError
from plait.config.lazy import load_object
from plait.config.load import load_config
from plait.config.originals.nanochat import BaseTrain, resolved_pattern, translate
from plait.config.schema import Config
from plait.tokenizers import load_tokenizer
from plait.training.distributed import choose_device

CHECKPOINTS, DATA, TOKENIZER = "base_checkpoints", "base_data", "tokenizer"


class Settings(BaseTrain):
    """nanochat's settings, and how to begin."""

    resume: str | None = Field(None, description="go on: auto for this run's newest checkpoint, or a folder")
    overwrite: bool = Field(False, description="begin anew in a folder that holds a run")
    dry_run: bool = Field(False, description="only show what the run would take")


def main(words: Sequence[str]) -> int:
    """Train as the command line says; the exit status."""
    line = read_command_line(words, Settings)
    how = {
        name: line.settings.pop(name) for name in ("resume", "overwrite", "dry_run") if name in line.settings
    }
    config = run_config(line)
    print0(f"Building model with config: {described(config)}")
    status: int = load_object("plait.cli.train:launch")(config, **how)
    return status


def run_config(line: CommandLine) -> Config:
    """The run that a command line means, in our schema, on this machine."""
    settings = dict(line.settings)
    if not settings.get("device_type"):
        settings["device_type"] = choose_device("auto").type
    try:
        values = translate(settings)
    except ConfigError as error:
        raise error if line.source is None else ConfigError(f"{line.source}: {error}") from None
    base = get_base_dir()
    values["training"]["out"] = str(base / CHECKPOINTS / values["experiment_name"])
    if (base / DATA).is_dir():
        values["data"]["train"] = str(base / DATA / "*.parquet")
    if (base / TOKENIZER).is_dir():
        values["tokenizer"] = {"type": load_tokenizer(base / TOKENIZER).type, "path": str(base / TOKENIZER)}
    return load_config(values, line.overrides)


def described(config: Config) -> dict[str, object]:
    """The GPTConfig of the run as it will be built, its pattern resolved, as nanochat prints it."""
    wanted = config.tokenizer
    ready = wanted.type == "bytes" or wanted.path is not None
    size = load_tokenizer(wanted).vocab_size if ready else wanted.vocab_size
    gpt = gpt_config_of(
        config.model.replace(vocab_size=config.model.vocab_size or size), config.data.sequence_length
    )
    pattern = resolved_pattern(gpt.block_pattern, gpt.n_layer)
    return asdict(replace(gpt, block_pattern=pattern))


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
