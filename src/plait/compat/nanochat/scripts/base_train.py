"""Pretraining: nanochat's settings, as a config file and options, become a run of ``plait train``.

    torchrun --standalone --nproc_per_node=8 -m plait.compat.nanochat.scripts.base_train configs/mamba_d20.py
    python -m plait.compat.nanochat.scripts.base_train --depth=4 --data.train=path/to/text --training.steps=100
    python -m plait.compat.nanochat.scripts.base_train --release=2026 --depth=24

Settings and model are nanochat's of October 2025, with --release=2026 those of July 2026. Text, tokenizer, checkpoints
and the tasks of CORE are in nanochat's folder (``common.get_base_dir``), unless --data.train, --tokenizer.path,
--training.out or --training.core_tasks say otherwise; a tokenizer that is not there is trained on the text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from plait.compat.nanochat.checkpoint_manager import plait_checkpoint
from plait.compat.nanochat.common import get_base_dir, print0, run_script
from plait.compat.nanochat.configurator import CommandLine, read_command_line, release_of_line
from plait.compat.nanochat.gpt_config import gpt_config_of
from plait.config.errors import ConfigError
from plait.config.lazy import load_object
from plait.config.load import load_config
from plait.config.originals.nanochat import BaseTrain, release_of, resolved_pattern, translate
from plait.config.originals.nanochat2026 import RELEASE, BaseTrain2026
from plait.config.schema import Config
from plait.config.section import Section
from plait.tokenizers import load_tokenizer

CHECKPOINTS, DATA, TOKENIZER, TASKS = "base_checkpoints", "base_data", "tokenizer", "eval_bundle"


class Beginning(Section):
    """How to begin."""

    resume: str | None = Field(None, description="go on: auto for this run's newest checkpoint, or a folder")
    overwrite: bool = Field(False, description="begin anew in a folder that holds a run")
    dry_run: bool = Field(False, description="only show what the run would take")


class Settings(BaseTrain, Beginning):
    """nanochat's settings of October 2025, and how to begin."""


class Settings2026(BaseTrain2026, Beginning):
    """nanochat's settings of July 2026, and how to begin."""

    resume_from_step: int = Field(
        -1, description="go on from this step of this run, Plait's or nanochat's; -1: begin"
    )


def main(words: Sequence[str]) -> int:
    """Train as the command line says; the exit status."""
    line = read_command_line(words, Settings2026 if release_of_line(words) == RELEASE else Settings)
    how = {name: line.settings.pop(name) for name in Beginning.model_fields if name in line.settings}
    step = line.settings.pop("resume_from_step", -1)
    config = run_config(line)
    print0(f"Building model with config: {described(config)}")
    if config.training.core_tasks is None and "core_metric_every" not in line.settings:
        print0(f"CORE is not evaluated while training: there is no {get_base_dir() / TASKS}")
    with ExitStack() as stack:
        if step > 0:
            how["resume"] = str(stack.enter_context(plait_checkpoint(Path(config.run_folder), step)))
        status: int = load_object("plait.cli.train:launch")(config, **how)
    return status


def run_config(line: CommandLine) -> Config:
    """The run that a command line means, in our schema, on this machine."""
    settings, base = dict(line.settings), get_base_dir()
    tokenizer = load_tokenizer(base / TOKENIZER) if (base / TOKENIZER).is_dir() else None
    if tokenizer is not None and release_of(settings) == RELEASE:
        settings.setdefault("vocab_size", tokenizer.vocab_size)
    try:
        values = translate(settings)
    except ConfigError as error:
        raise error if line.source is None else ConfigError(f"{line.source}: {error}") from None
    values["training"] |= core_settings(line, base)
    values["training"]["out"] = str(base / CHECKPOINTS / values["experiment_name"])
    if (base / DATA).is_dir():
        values["data"]["train"] = str(base / DATA / "*.parquet")
    if tokenizer is not None:
        values["tokenizer"] = {"type": tokenizer.type, "path": str(base / TOKENIZER)}
    return load_config(values, line.overrides)


def core_settings(line: CommandLine, base: Path) -> dict[str, Any]:
    """When CORE is evaluated: as often as was said, else as nanochat does if its tasks are there."""
    often, tasks = line.settings.get("core_metric_every"), base / TASKS
    if often is None and not tasks.is_dir():
        return {}
    every = int(BaseTrain.model_fields["core_metric_every"].default if often is None else often)
    return {"core_tasks": str(tasks), "core_every": every} if every > 0 else {}


def described(config: Config) -> dict[str, object]:
    """The GPTConfig of the run as it will be built, its pattern resolved, as nanochat prints it."""
    wanted = config.tokenizer
    ready = wanted.type == "bytes" or wanted.path is not None
    size = load_tokenizer(wanted).vocab_size if ready else wanted.vocab_size
    gpt = gpt_config_of(
        config.model.replace(vocab_size=config.model.vocab_size or size), config.data.sequence_length
    )
    if config.model.backout:  # July's, of attention alone: its windows in place of the hybrid's settings
        names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        windows = [layer.options.model_dump().get("window") for layer in config.model.layers()]
        return {name: getattr(gpt, name) for name in names} | {"windows": windows}
    pattern = resolved_pattern(gpt.block_pattern, gpt.n_layer)
    return asdict(replace(gpt, block_pattern=pattern))


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
