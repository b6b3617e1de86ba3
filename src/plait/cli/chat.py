"""``plait chat``: a conversation with a trained model, or one question; answers are shown as they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.terminal import stderr, write

if TYPE_CHECKING:
    from plait.inference.chat import ChatSession, ReplyPiece

app = typer.Typer(add_completion=False)

_QUIT, _CLEAR = ("quit", "exit"), "clear"


@app.command()
def chat(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A run, a checkpoint, or a folder with a saved model")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One question: its answer alone is shown")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "-t", min=0, help="0: always the likeliest; 1: as the model says"),
    ] = 0.6,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=0, help="Only among the k likeliest tokens; 0: among all")
    ] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens an answer")] = 512,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the first question")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers")] = None,
    tools: Annotated[bool, typer.Option(help="Whether the model may call the calculator")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
) -> None:
    """Talk with a trained model; each line of stdin is a message.

    clear begins a new conversation; quit, exit, Ctrl-D or an interrupt at the prompt ends. An interrupt while the model
    answers ends the answer. What the model calculates is shown in brackets, as expression = result.
    """
    from plait import api
    from plait.inference.chat import ChatEngine, ChatSession
    from plait.inference.tools import calculate

    engine = ChatEngine(api.load(path, device), tool=calculate if tools else None)
    session = ChatSession(engine, system)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k or None,
        "max_new_tokens": max_new_tokens,
    }
    if prompt is not None:
        _show(session.say(prompt, seed=seed, **options))
        return
    interactive = sys.stdin.isatty()
    if interactive:
        stderr().print("clear begins anew, quit ends", style="dim")
    for turn, message in enumerate(_messages(session, "You: " if interactive else "")):
        if interactive:
            write("Model: ")
        pieces = session.say(message, seed=None if seed is None else seed + turn, **options)
        try:
            _show(pieces)
        except KeyboardInterrupt:
            pieces.close()


def _messages(session: ChatSession, prompt: str) -> Iterator[str]:
    """The lines that are messages, until the end of stdin or a word that ends."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line.lower() in _QUIT:
            return
        if line.lower() == _CLEAR:
            session.clear()
        elif line:
            yield line


def _show(pieces: Iterator[ReplyPiece]) -> None:
    """Write an answer as it comes, calls of the calculator in brackets."""
    call = False
    try:
        for piece in pieces:
            if piece.begins:
                if piece.type == "python":
                    write("][" if call else "[")
                else:
                    write(" = " if call else "[= ")
                call = True
            elif piece.type == "text" and call:
                write("]")
                call = False
            write(piece.text)
    finally:
        write("]\n" if call else "\n")  # also after Ctrl-C: the next line is its own
