"""``plait estimate``: what of a config fits into a given memory, training and generating."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, pairs, size, stdout, table

if TYPE_CHECKING:
    from plait.training.estimate import Fit

app = typer.Typer(add_completion=False)


@app.command(cls=ConfigCommand, epilog=EPILOG)
def estimate(
    ctx: typer.Context,
    source: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A config file, a recipe, a preset or a run")
    ] = None,
    memory: Annotated[str, typer.Option(help="What the device has, like 12GB or 80GiB")] = "12GB",
) -> None:
    """Tell what fits into a memory: weights, gradients, optimizer, activations, and the cache of generation.

    A training step is run on tensors without numbers and the most that lives at one time is counted, so nothing is
    allocated and any size can be asked about. The allocator's own losses are not in it.
    """
    from plait.cli.source import read_config, with_vocabulary
    from plait.training.distributed import choose_device
    from plait.training.estimate import estimate, parse_size
    from plait.training.precision import product_dtype

    room = parse_size(memory)
    config = read_config(source, overrides(ctx))
    model, remark = with_vocabulary(config)
    found = estimate(config, model, room)
    step, console = found.step, stdout()
    rows = [
        ("parameters", number(found.parameters)),
        ("weights", size(step.weights)),
        ("gradients", size(step.gradients)),
        ("optimizer", size(step.optimizer)),
        ("activations", f"{size(step.activations)}, at the peak, of {found.rows} x {found.length} tokens"),
        ("a training step", size(step.peak)),
    ]
    if remark:
        rows.append(("vocabulary", remark))
    console.print(pairs(rows))
    made = table(
        "tokens a sequence",
        "sequences a micro-batch",
        "peak",
        "cache a sequence",
        "sequences generated",
        left=0,
    )
    for fit in found.fits:
        made.add_row(
            str(fit.length),
            str(fit.rows) if fit.rows else "none",
            size(fit.peak),
            "none" if fit.state is None else size(fit.state),
            "" if fit.sequences is None else number(fit.sequences),
        )
    dtype = product_dtype(config.training.precision, choose_device(config.training.device))
    console.print(f"\nWhat fits into {size(room)} (products in {str(dtype).removeprefix('torch.')}):")
    console.print(made)
    console.print(_verdict(found.enough, found.fits, found.length, room))


def _verdict(enough: bool, fits: list[Fit], length: int, room: int) -> str:
    if enough:
        return f"The config as it stands fits into {size(room)}."
    rows = next(fit.rows for fit in fits if fit.length == length)
    if rows:
        return (
            f"The config as it stands does not fit into {size(room)}; it does with "
            f"--training.micro_batch_tokens={rows * length}, and its steps stay the same."
        )
    return (
        f"Not even one sequence of {length} tokens fits into {size(room)}: take "
        "--training.activation_checkpointing=true, a shorter --data.sequence_length or a smaller model."
    )
