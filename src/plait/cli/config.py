"""``plait config``: what a config comes to, whether it is right, what it does when, and which ones are shipped."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, pairs, stderr, stdout
from plait.config.errors import TokenizerError
from plait.config.words import counted

if TYPE_CHECKING:
    from plait.config.schema import Config

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look at configs.")
Source = Annotated[
    str | None,
    typer.Argument(metavar="CONFIG", help="A config file, a recipe, a preset, or a run's folder"),
]


@app.command(cls=ConfigCommand, epilog=EPILOG)
def show(ctx: typer.Context, config: Source = None) -> None:
    """Print the whole config as YAML, every default filled in: a file that runs the same run."""
    from plait.cli.source import read_config
    from plait.config.load import config_yaml, load_config

    changes = overrides(ctx)
    resolved = load_config(None) if config is None and not changes else read_config(config, changes)
    sys.stdout.write(config_yaml(resolved))


@app.command(cls=ConfigCommand, epilog=EPILOG)
def validate(ctx: typer.Context, config: Source = None) -> None:
    """Check a config, and that its model can be built; nothing is read, allocated or written."""
    from plait.cli.source import read_config, with_vocabulary
    from plait.models.model import Model

    resolved = read_config(config, overrides(ctx))
    described, remark = with_vocabulary(resolved)
    model = Model(described, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    console = stdout()
    console.print(
        f"{config or 'the config'} is valid: {counted(len(model.blocks), 'layer')}, {number(count)} parameters"
    )
    if remark:
        console.print(remark, style="dim")


@app.command(cls=ConfigCommand, epilog=EPILOG)
def schedule(
    ctx: typer.Context,
    config: Source = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of data in an epoch; by default the data is prepared and counted"),
    ] = None,
) -> None:
    """Print when a run does what: how many steps it has, which are saved and kept, how long sequences are.

    Data is looked at only if it decides: where the run's length or the steps to save go by epochs.
    """
    from plait.cli.source import read_config, with_vocabulary
    from plait.models.model import Model
    from plait.training.horizon import horizon
    from plait.training.timetable import Epochs, scheduled_steps

    resolved = read_config(config, overrides(ctx))
    training, length = resolved.training, resolved.data.sequence_length
    plan = training.checkpoint_schedule
    if rows is None and (training.epochs is not None or plan.by_epoch):
        rows = _rows_of_an_epoch(resolved)
    described, _ = with_vocabulary(resolved)
    batch_rows = max(1, training.batch_tokens // length)
    run = horizon(training, Model(described, device="meta"), length, batch_rows, rows)
    assert run is not None  # an epoch's rows are known if they are asked for
    epochs = Epochs(rows or 1, batch_rows)
    kept = scheduled_steps(plan, run.steps, epochs)
    shown = [("steps", f"{run.steps:,}" + (f": {run.reason}" if run.reason else ""))]
    if training.minutes is not None:
        shown.append(("time", f"{training.minutes:g} minutes at most; shares of the run go by the clock"))
    if rows is not None:
        shown.append(
            (
                "epochs",
                f"{epochs.at(run.steps):.3g} of {counted(rows, 'row')}; the first ends at step {epochs.end(1)}",
            )
        )
    tokens = run.steps * batch_rows * length
    shown.append(("tokens", f"{tokens:,}, {batch_rows * length:,} a step"))
    every = (
        f"every {counted(training.checkpoint_every, 'step')}" if training.checkpoint_every else "at the end"
    )
    shown.append(("saved", f"{every}; of these the newest {training.keep_checkpoints} stay"))
    shown.append(("saved and kept", ", ".join(map(str, kept)) or "none; see training.checkpoint_schedule"))
    begin = 0.0
    for stage in training.sequence_length_schedule:
        shown.append(
            (f"{begin:.0%} to {stage.until:.0%}", f"sequences of {min(stage.length, length):,} tokens")
        )
        begin = stage.until
    if begin < 1:
        shown.append((f"{begin:.0%} to 100%", f"sequences of {length:,} tokens"))
    stdout().print(pairs(shown))


def _rows_of_an_epoch(config: Config) -> int:
    from plait.data import open_data
    from plait.tokenizers import load_tokenizer
    from plait.training.objectives import make_objective

    if config.tokenizer.type != "bytes" and config.tokenizer.path is None:
        raise TokenizerError(
            f"how many steps an epoch has depends on the tokenizer, and this {config.tokenizer.type} one is not "
            "trained yet: set tokenizer.path, or give --rows"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    with stderr().status("reading text"):
        labelled = config.training.objective == "classification"
        shards, _ = open_data(config.data, tokenizer, labels=labelled)
    return make_objective(config, tokenizer).samples(shards).count


@app.command(name="list")
def list_() -> None:
    """List the recipes (runs) and presets (models) that come with Plait."""
    from plait.config.recipes import preset_names, recipe_names

    console = stdout()
    console.print(pairs([("recipes", ", ".join(recipe_names())), ("presets", ", ".join(preset_names()))]))
    console.print(
        "\nEach is a CONFIG: plait info NAME, plait config show NAME, plait train NAME --data.train=..."
    )
