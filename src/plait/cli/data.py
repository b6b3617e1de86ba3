"""``plait data``: text into token shards ahead of the training that will find them, or into shards of raw bytes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, pairs, seconds, size, stderr, stdout, table
from plait.config.errors import DataError, TokenizerError

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
    from plait.data import TokenShards, open_data
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

        def progress(done: int) -> None:
            status.update(f"reading text: {size(done)}")

        if run.training.objective == "chat":
            from plait.data.conversations import open_conversations
            from plait.tokenizers.chat import with_chat_tokens

            tokenizer = with_chat_tokens(tokenizer)
            opened: tuple[TokenShards, TokenShards | None] = open_conversations(
                run.data, tokenizer, progress=progress
            )
        else:
            labels = run.training.objective == "classification"
            opened = open_data(run.data, tokenizer, labels=labels, progress=progress)
    took = time.perf_counter() - begin
    shown = table("split", "documents", "bytes", "tokens", "bytes a token", "rows")
    folders = []
    for name, shards in zip(("train", "validation"), opened):
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


@app.command()
def pack(
    sources: Annotated[list[str], typer.Argument(metavar="DATA...", help="Files, folders or globs of text")],
    out: Annotated[str, typer.Option(help="The folder to write, which must not be there yet")],
    separator: Annotated[
        int, typer.Option(min=0, max=255, help="The byte that ends a document, which no text may hold")
    ] = 0,
    shard_size: Annotated[float, typer.Option(min=0.001, help="MiB of a file, about")] = 64.0,
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of the documents to put apart, chosen by hash")
    ] = 0.0,
    format: Annotated[
        Literal["auto", "text", "jsonl", "parquet"],
        typer.Option(help="Of the data; auto: by the file's ending"),
    ] = "auto",
    field: Annotated[str, typer.Option(help="The key or column that holds the text")] = "text",
) -> None:
    """Pack texts into shards of raw bytes, shard_00000.bin and so on, for models that read bytes.

    With a validation fraction into two folders, train and validation: no document is in both.
    """
    from plait.data.byte_shards import pack_bytes
    from plait.data.documents import read_documents

    root, begin = Path(out), time.perf_counter()
    if root.exists():
        raise DataError(f"{root} is there already; give another folder, or remove it")
    sides: list[tuple[Literal["all", "train", "validation"], Path]] = [("all", root)]
    if validation_fraction:
        sides = [("train", root / "train"), ("validation", root / "validation")]
    shown = table("folder", "files", "documents", "bytes")
    try:
        with stderr().status("packing") as status:
            for split, folder in sides:
                documents = read_documents(sources, format, field, split=split, fraction=validation_fraction)
                packed = pack_bytes(
                    documents,
                    folder,
                    separator,
                    round(shard_size * (1 << 20)),
                    lambda done: status.update(f"packing: {size(done)}"),
                )
                shown.add_row(str(folder), number(packed.files), number(packed.documents), size(packed.bytes))
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)  # both sides or none
        raise
    console = stdout()
    console.print(shown)
    named = "".join(
        f" --data.{name}={folder}" for name, (_, folder) in zip(("train", "validation"), sides, strict=False)
    )
    console.print(f"\nnext: plait train CONFIG{named} --data.format=bytes --data.separator={separator}")
    stderr().print(f"packed in {seconds(time.perf_counter() - begin)}", style="dim")
