"""``plait info``: a model's stack, layer by layer, without building it in memory."""

from __future__ import annotations

from typing import Annotated

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, pairs, size, stdout
from plait.config.words import counted

app = typer.Typer(add_completion=False)


@app.command(cls=ConfigCommand, epilog=EPILOG)
def info(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|PATH", help="A config file, a recipe, a preset, a run, or a saved model"
        ),
    ],
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of the sequence that FLOPs and states are for")
    ] = 2048,
) -> None:
    """Show the stack of a model: each layer's kind, parameters, FLOPs a token, and the bytes of its state.

    The model is built without its numbers, so any size takes no memory and no time.
    """
    from plait.cli.source import read_model
    from plait.cli.stack import parts_line, stack_of, stack_table
    from plait.models.model import Model

    config, remark = read_model(source, overrides(ctx))
    model = Model(config, device="meta")
    stack = stack_of(model, length)
    console = stdout()
    console.print(
        f"{source}: {number(stack.parameters)} parameters, {counted(len(model.blocks), 'layer')}, "
        f"d_model {config.d_model}, "
        f"vocabulary {config.vocab_size}, {'causal' if config.causal else 'not causal'}"
    )
    console.print(stack_table(stack))
    rows = [
        ("parameters", parts_line(stack)),
        ("weights", f"{size(4 * stack.parameters)} in float32, {size(2 * stack.parameters)} in bfloat16"),
        (
            "FLOPs",
            f"of a forward, two a multiply-add, averaged over {length} tokens; training takes three times that",
        ),
        ("state", f"what a layer remembers of {length} tokens of one sequence, in float32"),
    ]
    if remark:
        rows.append(("vocabulary", remark))
    console.print(pairs(rows))
