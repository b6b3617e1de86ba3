"""``plait data prepare``: text into token shards, ahead of the training that will find them."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, pairs, seconds, size, stderr, stdout, table
from plait.config.errors import TokenizerError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Prepare data.")


@app.callback()
def data() -> None:
    """Prepare data."""


@app.command(cls=ConfigCommand, epilog=EPILOG)
def prepare(
    ctx: typer.Context,
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A config file, a recipe, or a run's folder")
    ] = None,
) -> None:
    """Turn the text that a config names into token shards, and count it.

    Training does the same when it begins; prepared once, it begins at once. The shards lie in data.cache, or in the
    user's cache folder, under a name that says all they depend on.
    """
    from plait.cli.source import read_config
    from plait.data import open_data
    from plait.tokenizers import load_tokenizer

    run = read_config(config, overrides(ctx))
    if run.tokenizer.type != "bytes" and run.tokenizer.path is None:
        raise TokenizerError(
            f"tokenizer.path: a {run.tokenizer.type} tokenizer must be trained first: "
            f"plait tokenizer train --type {run.tokenizer.type} --data ... --out FOLDER"
        )
    tokenizer = load_tokenizer(run.tokenizer)
    begin = time.perf_counter()
    with stderr().status("reading text") as status:
        train, validation = open_data(
            run.data,
            tokenizer,
            labels=run.training.objective == "classification",
            progress=lambda done: status.update(f"reading text: {size(done)}"),
        )
    took = time.perf_counter() - begin
    shown = table("split", "documents", "bytes", "tokens", "bytes a token", "rows")
    folders = []
    for name, shards in (("train", train), ("validation", validation)):
        if shards is None:
            continue
        shown.add_row(
            name,
            number(shards.n_documents),
            size(shards.n_bytes),
            number(shards.n_tokens),
            f"{shards.n_bytes / max(1, shards.n_tokens):.2f}",
            number(shards.n_tokens // run.data.sequence_length),
        )
        folders.append((name, shards.folder))
    console = stdout()
    console.print(shown)
    console.print(pairs(folders))
    stderr().print(f"prepared in {seconds(took)}", style="dim")
