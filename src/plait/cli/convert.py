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
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only", help="nanochat: the model alone, though the optimizers' state lies beside it"
        ),
    ] = False,
) -> None:
    """Turn a model of nanochat, MiniMamba, Model Foundry or BitByte into one of Plait's.

    Afterwards DST is a model like any other: plait generate DST, plait info DST, plait.load(DST). What an original
    computes in its own way stays so, as options of the model in its config.json. With the state of nanochat's
    optimizers DST is a run to go on with: plait train --resume DST.
    """
    from plait.formats import convert as formats
    from plait.formats.folders import list_checkpoints
    from plait.tokenizers.load import load_tokenizer

    model = formats.convert(
        source,
        destination,
        format,
        None if config is None else read_config_file(Path(config)),
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        allow_pickle=allow_pickle,
        weights_only=weights_only,
    )
    found = model.tokenizer
    rows = [
        ("layers", f"{len(model.blocks)} ({', '.join(dict.fromkeys(block.kind for block in model.blocks))})"),
        ("parameters", number(model.parameter_counts()["total"])),
        ("tokenizer", "none" if found is None else f"{found.type}, {found.vocab_size} ids"),
        ("saved in", destination),
    ]
    console = stdout()
    checkpoints = list_checkpoints(Path(destination))
    if checkpoints:
        rows += _goes_on(checkpoints[-1])
    console.print(pairs(rows))
    if checkpoints:
        more = "--data.train=TEXT --training.steps=N"
        console.print(f"\nto go on training: plait train --resume {destination} {more}")
    if model.config.head.kind == "lm" and found is not None:
        console.print(f"\nnext: plait generate {destination} PROMPT")
    else:
        why = "" if found is not None else "; it has no tokenizer (--tokenizer adds one)"
        console.print(f'\nnext, from Python: plait.load("{destination}"){why}')


def _goes_on(checkpoint: Path) -> list[tuple[str, str]]:
    """What the run in a converted folder begins with, and what it cannot."""
    from plait.training.checkpoint import read_state

    state = read_state(checkpoint)
    return [
        ("training", f"after step {state.step:,}, with the optimizers' state"),
        (
            "data",
            f"from row {state.sample:,} of the text in Plait's order; the place in nanochat's files is not kept",
        ),
    ]
