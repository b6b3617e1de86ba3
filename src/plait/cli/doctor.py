"""``plait doctor``: what this machine offers, and whether every backend of every op computes right on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.machine import hardware, optional_packages, versions
from plait.cli.terminal import pairs, seconds, stderr, stdout, table
from plait.config.errors import BackendError, ConfigError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    warm: Annotated[
        bool, typer.Option("--warm", help="Compile now what first steps would wait for, instead of checking")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="With --warm: for this model; else for each kind of layer"),
    ] = None,
) -> None:
    """Show versions, devices, memory and packages, and check every backend's numbers against the reference.

    A backend that computes wrong here is not used any more, until it is found right; the exit status is then 1.
    """
    if warm:
        _warm(config)
        return
    if config is not None:
        raise ConfigError("--config says what --warm compiles for; give both, or neither")
    console = stdout()
    with stderr().status("looking around"):
        facts = [*versions(), *hardware()]
    console.print(pairs(facts))
    console.print()
    console.print(pairs(optional_packages()))
    with stderr().status("checking each backend"):
        found, notes, failures = check_backends()
    console.print(found)
    for note in notes:
        console.print(note, style="dim")
    if failures:
        for failure in failures:
            console.print(f"wrong: {failure}", style="bold red")
        console.print(
            "Plait will not use what is wrong on this machine, until plait doctor finds it right: other backends take "
            "its place, and who asks for it by name is told. Please report this."
        )
        raise typer.Exit(1)
    console.print("Every backend that can run here computes what the reference does.")


def _warm(source: str | None) -> None:
    from plait.cli.source import read_model
    from plait.cli.warm import warm

    console = stdout()
    model = None if source is None else read_model(source, ())[0]
    for name, taken in warm(model, _places()):
        console.print(f"{name}: ready after {seconds(taken)}")


def check_backends() -> tuple[Table, list[str], list[str]]:
    """The op x backend table with errors, remarks on what cannot run, and the names of what is wrong.

    What is wrong is recorded, so that it is not used on this machine from now on.
    """
    from plait.ops import verdicts

    with verdicts.ignored():
        found, notes, wrong = _compare()
    verdicts.record(wrong)
    return (
        found,
        notes,
        [f"{backend} {op} on {place}: {words}" for (op, backend, place), words in wrong.items()],
    )


def _compare() -> tuple[Table, list[str], dict[tuple[str, str, str], str]]:
    from plait.ops.dispatch import BACKENDS
    from plait.ops.dispatch import table as backends

    rows = backends()
    places = _places()
    accelerator = [("portable", place) for place in places if place.type != "cpu"]
    columns = [(name, _place_of(name, places)) for name in BACKENDS] + accelerator
    made = table(
        "op", *(name if place.type in ("cpu", name) else f"{name} on {place.type}" for name, place in columns)
    )
    available = {(row.op, row.backend): row.available for row in rows}
    # An op that has no such backend is a matter of course; a backend that lacks something is worth a line.
    lacking = {
        f"{row.backend}: {row.reason}"
        for row in rows
        if not row.available and "this op has only" not in row.reason
    }
    failures: dict[tuple[str, str, str], str] = {}
    for op in dict.fromkeys(row.op for row in rows):
        cells = []
        for name, place in columns:
            cell = "-"
            if available[op, name]:
                cell, wrong, refused = _check(op, name, place)
                if wrong:
                    failures[op, name, place.type] = wrong
                if refused:
                    lacking.add(f"{name}: {refused}")
            cells.append(cell)
        made.add_row(op, *cells)
    notes = ["error in float32 against the reference in float64, outputs and gradients; - : not here"]
    return made, [*notes, *sorted(lacking)], failures


def _check(op: str, backend: str, place: torch.device) -> tuple[str, str, str]:
    """(what stands in the table, what is wrong, why it refused to run)."""
    from plait.cli import selfcheck

    try:
        error = selfcheck.check(op, backend, place)
    except BackendError as refusal:
        return "-", "", str(refusal)
    except Exception as fault:  # whatever a backend does wrong on this machine is what we are looking for
        return "WRONG", f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}", ""
    if error > selfcheck.TOLERANCE:
        return "WRONG", f"error {error:.1e}, at most {selfcheck.TOLERANCE:g} is allowed", ""
    return f"{error:.1e}", "", ""


def _places() -> list[torch.device]:
    import torch

    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _place_of(backend: str, places: list[torch.device]) -> torch.device:
    cuda = [place for place in places if place.type == "cuda"]
    return cuda[0] if backend == "gpu" and cuda else places[0]
