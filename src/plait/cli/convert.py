"""``plait convert``: another system's trained model as a folder that Plait loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from plait.cli.terminal import number, pairs, stdout
from plait.config.load import read_config_file

app = typer.Typer(add_completion=False)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Its folder or file, or a state dict (.safetensors, .pt)")
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A new folder for the converted model")],
    format: Annotated[
        Literal["nanochat", "minimamba", "foundry", "bitbyte"],
        typer.Option("--from", help="Whose files they are"),
    ],
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The configuration, where SRC is weights alone (JSON, YAML)"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A tokenizer to save with the model, where SRC has none"),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="nanochat: open tokenizer.pkl, of which only a tokenizer is read"
        ),
    ] = False,
) -> None:
    """Turn a model of nanochat, MiniMamba, Model Foundry or BitByte into one of Plait's.

    Afterwards DST is a model like any other: plait generate DST, plait info DST, plait.load(DST). What an original
    computes in its own way stays so, as options of the model in DST/config.json.
    """
    from plait.formats import convert as formats
    from plait.tokenizers.load import load_tokenizer

    model = formats.convert(
        source,
        destination,
        format,
        None if config is None else read_config_file(Path(config)),
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        allow_pickle=allow_pickle,
    )
    found = model.tokenizer
    rows = [
        ("layers", f"{len(model.blocks)} ({', '.join(dict.fromkeys(block.kind for block in model.blocks))})"),
        ("parameters", number(model.parameter_counts()["total"])),
        ("tokenizer", "none" if found is None else f"{found.type}, {found.vocab_size} ids"),
        ("saved in", destination),
    ]
    console = stdout()
    console.print(pairs(rows))
    if model.config.head.kind == "lm" and found is not None:
        console.print(f"\nnext: plait generate {destination} PROMPT")
    else:
        why = "" if found is not None else "; it has no tokenizer (--tokenizer adds one)"
        console.print(f'\nnext, from Python: plait.load("{destination}"){why}')
