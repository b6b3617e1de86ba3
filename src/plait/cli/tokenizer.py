"""``plait tokenizer``: a vocabulary from text or from nanochat, saved as a folder that a config names."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from plait.cli.terminal import pairs, seconds, size, stderr, stdout
from plait.config.errors import TokenizerError

if TYPE_CHECKING:
    from plait.tokenizers import Tokenizer

_MEASURED_BYTES = 1 << 20  # of text, to say how many bytes a token stands for

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train or import a tokenizer.")


@app.callback()
def tokenizer() -> None:
    """Train or import a tokenizer."""


@app.command()
def train(
    data: Annotated[list[str], typer.Option(help="Files, a folder or a glob of text; may be given again")],
    out: Annotated[str, typer.Option(help="The folder to write")],
    type: Annotated[
        Literal["bpe", "wordpiece", "unigram", "characters", "sentencepiece", "bytes"],
        typer.Option(help="Its kind"),
    ] = "bpe",
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens, special ones among them; by default 8192, or all characters"),
    ] = None,
    format: Annotated[
        Literal["auto", "text", "jsonl", "parquet"],
        typer.Option(help="Of the data; auto: by the file's ending"),
    ] = "auto",
    field: Annotated[str, typer.Option(help="The key or column that holds the text")] = "text",
    special_token: Annotated[
        list[str] | None, typer.Option(help="A token that is never split; may be given again")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With the special tokens of conversations")] = False,
    split: Annotated[
        Literal["gpt2", "gpt4", "nanochat"],
        typer.Option(help="bpe, unigram: whose pattern cuts text before tokens are made of it"),
    ] = "gpt2",
    lowercase: Annotated[bool, typer.Option("--lowercase", help="Lower the case of all text")] = False,
) -> None:
    """Train a tokenizer on text and save it in a folder."""
    from plait.config.data import TokenizerConfig
    from plait.data.documents import read_documents
    from plait.data.sources import resolve_sources
    from plait.tokenizers import train_tokenizer
    from plait.tokenizers.base import to_bytes

    config = TokenizerConfig(
        type=type,
        vocab_size=vocab_size,
        special_tokens=special_token,
        chat=chat,
        split=split,
        lowercase=lowercase,
    )
    begin = time.perf_counter()
    n_bytes = 0
    sample: list[str | bytes] = []

    def texts() -> Iterator[str | bytes]:
        nonlocal n_bytes
        for document in read_documents(data, format, field):
            if n_bytes < _MEASURED_BYTES:
                sample.append(document.text[: _MEASURED_BYTES - n_bytes])
            n_bytes += len(to_bytes(document.text))
            yield document.text

    resolve_sources(data, format)  # a file that is not there is an error at once
    with stderr().status("training the tokenizer"):
        trained = train_tokenizer(config, texts())
    _save(trained, Path(out))
    took = time.perf_counter() - begin
    rows = [("vocabulary", f"{trained.vocab_size} tokens, {len(trained.special_tokens)} of them special")]
    if n_bytes:
        n_ids = sum(map(len, trained.encode_batch(islice(sample, 1000))))
        measured = sum(len(to_bytes(text)) for text in islice(sample, 1000))
        rows.append(("text", f"{size(n_bytes)} in {seconds(took)}"))
        rows.append(("a token", f"{measured / max(1, n_ids):.2f} bytes of it on average"))
    rows.append(("saved in", out))
    stdout().print(pairs(rows))
    stdout().print(_next(trained, out))


@app.command("import")
def import_(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="nanochat's tokenizer folder, or the folder that it lies in"),
    ],
    out: Annotated[str, typer.Option(help="The folder to write")],
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Open tokenizer.pkl: a pickle, of which only a tokenizer is read"
        ),
    ] = False,
) -> None:
    """Make a nanochat tokenizer one of ours, with the same ids; tiktoken is not needed."""
    from plait.tokenizers.nanochat import read_tokenizer

    read = read_tokenizer(path, allow_pickle=allow_pickle)
    _save(read, Path(out))
    special = ", ".join(read.special_tokens) or "none"
    stdout().print(
        pairs([("vocabulary", f"{read.vocab_size} tokens"), ("special", special), ("saved in", out)])
    )
    stdout().print(_next(read, out))


def _next(tokenizer: Tokenizer, folder: str) -> str:
    return f"\nnext: plait train CONFIG --tokenizer.type={tokenizer.type} --tokenizer.path={folder}"


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """Save, or leave nothing behind."""
    is_new = not folder.exists()
    try:
        tokenizer.save(folder)
    except TokenizerError:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
