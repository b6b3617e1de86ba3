"""Training by BitByte's flags: a run of ``plait train``.

    python -m plait.compat.bitbyte.train --data bytes --out runs/bytes --steps 1000 --n_layer 8 --d_model 512 --n_head 8
    torchrun --standalone --nproc_per_node=2 -m plait.compat.bitbyte.train --ddp --data bytes

``--data`` is a folder of shard_*.bin, or one with such folders train and validation, as ``plait data pack`` writes
them. Keys of Plait's own config may follow: --training.eval_every=100. See plait.config.originals.bitbyte.Flags.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from plait.compat.bitbyte.commands import run_script
from plait.compat.nanochat.configurator import CommandLine, read_command_line
from plait.config.errors import ConfigError
from plait.config.lazy import load_object
from plait.config.load import load_config
from plait.config.originals.bitbyte import Flags, refuse_strangers, translate
from plait.config.schema import Config
from plait.training.distributed import choose_device


def main(words: Sequence[str]) -> int:
    """Train as the flags say; the exit status."""
    refuse_strangers([word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")])
    line = read_command_line(words, Flags)
    config = run_config(line)
    resume = None if line.settings.get("no_opt_state") else line.settings.get("resume")
    if resume is not None and Path(resume).is_file():
        raise ConfigError(
            f"--resume wants a run's folder, and {resume} is a file: BitByte's checkpoints are resumed by "
            "training.trainer.Trainer, or become a model by plait convert"
        )
    status: int = load_object("plait.cli.train:launch")(config, resume=resume)
    return status


def run_config(line: CommandLine) -> Config:
    """The run that the flags mean, in our schema, on this machine."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if line.settings.get("ddp") and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "--ddp: start the processes with torchrun --standalone --nproc_per_node=N -m plait.compat.bitbyte.train"
        )
    values = translate(line.settings, processes)
    if choose_device("auto").type != "cuda":
        values["training"]["precision"] = "fp32"
    folder = Path(values["data"]["train"] or ".")
    if (folder / "train").is_dir() and (folder / "validation").is_dir():
        values["data"] |= {"train": str(folder / "train"), "validation": str(folder / "validation")}
    return load_config(values, line.overrides)


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
