"""``plait train``: shows what will run, trains, and says what to do next."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, pairs, seconds, size, stdout
from plait.config.errors import ConfigError, DataError

if TYPE_CHECKING:
    from plait.config.schema import Config
    from plait.training import TrainResult

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
        typer.Argument(metavar="[CONFIG]", help="A config file, a recipe or a preset (plait config list)"),
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
    from plait.training import train as run

    settings = _settings(config, resume, overrides(ctx))
    first = os.environ.get("RANK", "0") == "0"
    if not dry_run and settings.data.train is None:
        raise DataError(
            "data.train: no text is named to train on; give a file, a folder, a glob or a list of them"
        )
    if first:
        _show(settings)
    if dry_run:
        if first:
            _show_dry_run(settings)
        return
    result = run(settings, resume=resume, overwrite=overwrite)
    if first:
        _show_next(result, settings)
    if result.stopped == "signal":
        raise typer.Exit(130)  # saved, but not what was asked for: a script must not go on as if it were


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


def _show(config: Config) -> None:
    """The essentials of the run, and the stack of its model."""
    from plait.cli.source import with_vocabulary
    from plait.cli.stack import stack_of, stack_table
    from plait.models.model import Model

    described, remark = with_vocabulary(config)
    model = Model(described, device="meta")
    data, training = config.data, config.training
    stack = stack_of(model, data.sequence_length)
    length = f"{training.minutes:g} minutes at most, " if training.minutes else ""
    length += f"{training.epochs:g} epochs" if training.epochs else f"{training.steps:,} steps"
    console = stdout()
    console.print(
        pairs(
            [
                ("run", config.run_folder),
                (
                    "data",
                    f"{_listed(data.train)}; rows of {data.sequence_length} tokens, documents {data.documents}",
                ),
                (
                    "tokenizer",
                    remark or f"{config.tokenizer.path or config.tokenizer.type}, {described.vocab_size} ids",
                ),
                ("training", f"{training.objective}, {length} of {training.batch_tokens:,} tokens"),
                (
                    "optimizer",
                    f"{training.optimizer}, lr {training.lr:g}, {training.schedule}, {training.precision}, "
                    f"seed {training.seed}",
                ),
            ]
        )
    )
    console.print(stack_table(stack))


def _listed(spec: str | list[str] | None) -> str:
    if spec is None:
        return "none yet"
    return spec if isinstance(spec, str) else ", ".join(spec)


def _show_dry_run(config: Config) -> None:
    from plait.training.dry_run import dry_run

    plan = dry_run(config)
    tokens = plan.steps * plan.tokens_per_step
    held = plan.weights + plan.gradients + plan.optimizer + plan.activations
    console = stdout()
    console.print(
        pairs(
            [
                ("parameters", ", ".join(f"{name} {number(n)}" for name, n in plan.groups.items())),
                (
                    "memory",
                    f"about {size(held)} a process: weights {size(plan.weights)}, gradients {size(plan.gradients)}, "
                    f"optimizer {size(plan.optimizer)}, activations about {size(plan.activations)}",
                ),
                ("cache", f"{size(plan.cache)} for one sequence of {config.data.sequence_length} tokens"),
                (
                    "work",
                    f"{number(plan.flops_per_step)} FLOPs a step, {plan.steps:,} steps, {number(tokens)} tokens",
                ),
                (
                    "this machine",
                    f"{number(plan.matmul_rate)} FLOPs a second in large matrix products, measured now",
                ),
                (
                    "time",
                    f"at least {seconds(plan.fastest)}; small models reach a tenth to a half of that rate: "
                    f"{seconds(2 * plan.fastest)} to {seconds(10 * plan.fastest)}",
                ),
            ]
        )
    )
    console.print("\nnothing was read, allocated or written: this was a dry run", style="dim")


def _show_next(result: TrainResult, config: Config) -> None:
    """The commands that one would type now."""
    run = shlex.quote(str(result.run))
    held_out = "" if result.validation is None else f", held-out loss {result.validation.loss:.4f}"
    if result.validation is not None and result.validation.bits_per_byte is not None:
        held_out += f" ({result.validation.bits_per_byte:.3f} bits per byte)"
    console = stdout()
    console.print(
        f"\nstep {result.step:,}, {number(result.tokens)} tokens in {seconds(result.elapsed)}{held_out}"
    )
    lines = []
    if config.model.head.kind == "lm" and config.model.causal:
        prompt = next((text for text in config.training.sample_prompts if text), "Once upon a time")
        lines.append((f"plait generate {run} {shlex.quote(prompt)}", "what it writes"))
    more = {
        "steps": f" --training.steps={2 * result.step}",
        "time": f" --training.minutes={2 * (config.training.minutes or 0):g}",
        "signal": "",
    }
    lines.append((f"plait train --resume {run}{more[result.stopped]}", "go on"))
    lines.append((f"plait plot {run}", "the loss curve"))
    console.print("next:")
    width = max(len(command) for command, _ in lines)
    for command, what in lines:
        console.print(f"  {command:<{width}}   # {what}")
