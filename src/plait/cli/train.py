"""``plait train``: shows what will run, trains, and says what to do next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.summary import show_dry_run, show_next, show_run
from plait.config.errors import ConfigError, DataError

if TYPE_CHECKING:
    from plait.config.schema import Config

AUTO = "auto"
app = typer.Typer(add_completion=False)


class TrainCommand(ConfigCommand):
    """``--resume`` may stand alone; then it means the newest checkpoint of the run that the config names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command, with ``--resume`` spelled out."""
        following = [*args[1:], "--"][: len(args)]
        spelled = [
            f"--resume={AUTO}" if word == "--resume" and after.startswith("-") else word
            for word, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, spelled)


@app.command(cls=TrainCommand, epilog=EPILOG)
def train(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A config file, a recipe or a preset (plait config list)"),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH|auto]", help="Go on with a run or from a checkpoint; alone or auto: this config's"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in a folder that holds a run")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what it would take: parameters, memory, FLOPs, time")
    ] = False,
) -> None:
    """Train a model that a config describes, or resume a run.

    A run's folder holds all of it: plait train --resume runs/NAME goes on with nothing else.
    """
    settings = _settings(config, resume, overrides(ctx))
    status = launch(settings, resume=resume, overwrite=overwrite, dry_run=dry_run)
    if status:
        raise typer.Exit(status)


def launch(
    settings: Config, *, resume: str | None = None, overwrite: bool = False, dry_run: bool = False
) -> int:
    """Show what will run, train, and say what to do next; 130 if a signal stopped it. Under torchrun, rank 0 shows."""
    from plait.training import train as run
    from plait.training.initial import begun_config

    first = os.environ.get("RANK", "0") == "0"
    if not dry_run and settings.data.train is None:
        raise DataError(
            "data.train: no text is named to train on; give a file, a folder, a glob or a list of them"
        )
    if resume in (None, AUTO):
        settings = begun_config(settings, resume=resume == AUTO)
    if first:
        show_run(settings)
    if dry_run:
        if first:
            show_dry_run(settings)
        return 0
    result = run(settings, resume=resume, overwrite=overwrite)
    if first:
        show_next(result, settings)
    # Saved, but not what was asked for if a signal stopped it: a script must not go on as if it were.
    return 130 if result.stopped == "signal" else 0


def _settings(config: str | None, resume: str | None, changes: list[str]) -> Config:
    """The config of this run: as given, or that of the run to resume."""
    if config is None and resume is not None and resume != AUTO:
        if Path(resume).is_file():
            raise ConfigError(
                f"--resume wants a run or a checkpoint, {resume} is a file: plait train {resume} --resume"
            )
        from plait.training.resume import find_checkpoint, resumed_config

        find_checkpoint(resume, Path(resume))  # it says best what is wrong with it
        return resumed_config(resume, changes)
    if config is None and resume == AUTO and not changes:
        raise ConfigError("--resume alone needs to know of what: plait train --resume runs/NAME")
    from plait.cli.source import read_config

    return read_config(config, changes)
