"""``plait generate``: what a trained model writes after a prompt, as it writes it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.terminal import seconds, stderr, stdout, write
from plait.config.errors import CheckpointError
from plait.config.words import counted

if TYPE_CHECKING:
    from plait.models.model import Model

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A run, a checkpoint, or a folder with a saved model")
    ],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=0, help="At most so many tokens are written")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest; 1: as the model says")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only among the k likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only among the likeliest that together reach p")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Only tokens with p times the likeliest's chance")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens already there are less likely")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text to stop before; may be given again")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="So many continuations")] = 1,
    stream: Annotated[bool, typer.Option(help="Show the text as it is written (one sample alone)")] = True,
    echo: Annotated[
        bool | None, typer.Option(help="Show the prompt before its continuation; by default in a terminal")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
) -> None:
    """Continue a text with a trained model.

    The text goes to stdout, the speed to stderr.
    """
    from plait import api

    if prompt == "-":
        prompt = sys.stdin.read()
    model = api.load(path, device)
    if model.tokenizer is None:
        raise CheckpointError(
            f"{path} has no tokenizer beside its weights, so it can neither read nor write text"
        )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or (),
        "seed": seed,
        "num_samples": num_samples,
    }
    begin = time.perf_counter()
    shown = prompt if (sys.stdout.isatty() if echo is None else echo) else ""
    if stream and num_samples == 1:
        tokens = _stream(model, prompt, shown, options)
    else:
        tokens = _at_once(model, prompt, shown, options)
    took = time.perf_counter() - begin
    stderr().print(
        f"{counted(tokens, 'token')} in {seconds(took)}, {tokens / max(took, 1e-9):,.0f} tokens/s",
        style="dim",
    )


def _stream(model: Model, prompt: str, shown: str, options: dict[str, Any]) -> int:
    """Write each piece as it comes; the number of tokens."""
    from plait.inference.generate import stream_generate

    tokens = 0
    pieces = stream_generate(model, prompt, **options)  # mistakes raise here, before anything is written
    stdout().print(shown, end="", style="bold")
    try:
        for piece in pieces:
            tokens += len(piece.ids)
            write(piece.text)
    finally:
        write("\n")  # also after Ctrl-C: the shell's next line is its own
    return tokens


def _at_once(model: Model, prompt: str, shown: str, options: dict[str, Any]) -> int:
    """Write whole samples, each under its number if there are several; the number of tokens."""
    from plait.inference.generate import complete

    rows = complete(model, prompt, **options)
    console = stdout()
    for index, row in enumerate(rows):
        if len(rows) > 1:
            console.print(f"--- sample {index + 1} of {len(rows)} ---", style="dim")
        console.print(shown, end="", style="bold")
        write(f"{row.text}\n")
    return sum(len(row.ids) for row in rows)
