"""``plait config``: what a config comes to, whether it is right, and which ones are shipped."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, pairs, stdout

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
        f"{config or 'the config'} is valid: {len(model.blocks)} layers, {number(count)} parameters"
    )
    if remark:
        console.print(remark, style="dim")


@app.command(name="list")
def list_() -> None:
    """List the recipes (runs) and presets (models) that come with Plait."""
    from plait.config.recipes import preset_names, recipe_names

    console = stdout()
    console.print(pairs([("recipes", ", ".join(recipe_names())), ("presets", ", ".join(preset_names()))]))
    console.print(
        "\nEach is a CONFIG: plait info NAME, plait config show NAME, plait train NAME --data.train=..."
    )
