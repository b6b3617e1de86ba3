"""``plait plot``: the loss curve of a run, as a picture."""

from __future__ import annotations

from typing import Annotated

import typer

from plait.cli.terminal import stdout

app = typer.Typer(add_completion=False)


@app.command()
def plot(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder")],
    out: Annotated[
        str | None, typer.Option(help="The PNG to write; by default loss.png in the run's folder")
    ] = None,
) -> None:
    """Draw a run's loss over its steps, in training and held out, as a PNG."""
    from plait.training.plot import plot_run

    stdout().print(f"saved {plot_run(run, out)}")
