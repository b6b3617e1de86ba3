"""``plait eval``: what a trained model knows, in bits per byte, CORE tasks, surprisals and minimal pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.terminal import harmless, number, pairs, stderr, stdout, table
from plait.config.errors import DataError
from plait.config.words import counted

if TYPE_CHECKING:
    from plait.models.model import Model

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Evaluate a trained model.")

ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="A run, a checkpoint, or a saved model")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")]
Json = Annotated[str | None, typer.Option("--json", help="Also write the result to this file")]


@app.callback()
def evaluate() -> None:
    """Evaluate a trained model."""


@app.command()
def bpb(
    model: ModelPath,
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Files, folders or globs of text")],
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens that attention looks back; by default all")
    ] = None,
    field: Annotated[str, typer.Option(help="The key or column that holds the text")] = "text",
    device: Device = "auto",
    out: Json = None,
) -> None:
    """Bits per byte over texts: each byte predicted once, from its own document alone."""
    from plait.data.documents import read_documents
    from plait.evaluation.bits_per_byte import bits_per_byte

    with stderr().status("evaluating"):
        score = bits_per_byte(
            _load(model, device), read_documents(data, "auto", field), max_context=max_context
        )
    stdout().print(
        pairs(
            [
                ("bits per byte", f"{score.bits_per_byte:.4f}"),
                ("nats a token", f"{score.loss:.4f}"),
                ("perplexity", f"{score.perplexity:.3f}"),
                ("bytes", number(score.n_bytes)),
                ("tokens", number(score.n_targets)),
            ]
        )
    )
    _write(
        out,
        {
            "bits_per_byte": score.bits_per_byte,
            "nats_per_token": score.loss,
            "bytes": score.n_bytes,
            "tokens": score.n_targets,
        },
    )


@app.command()
def core(
    model: ModelPath,
    bundle: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="core.yaml, eval_meta_data.csv and eval_data/")
    ],
    max_per_task: Annotated[int | None, typer.Option(min=1, help="Items of a task; by default all")] = None,
    device: Device = "auto",
    out: Json = None,
) -> None:
    """CORE: in-context tasks from local files, each against its chance level, and their mean."""
    from plait.evaluation.core import core_score, evaluate_task, read_bundle

    tasks, loaded, scores = read_bundle(bundle), _load(model, device), []
    for task in tasks:
        with stderr().status(f"evaluating {task.name}"):
            scores.append(evaluate_task(loaded, task, limit=max_per_task))
    made = table("task", "items", "accuracy", "centered")
    for score in scores:
        made.add_row(score.name, str(score.n_items), f"{score.accuracy:.3f}", f"{score.centered:.3f}")
    made.add_section()
    made.add_row("CORE", "", "", f"{core_score(scores):.4f}", style="bold")
    stdout().print(made)
    results = {s.name: {"accuracy": s.accuracy, "centered": s.centered, "items": s.n_items} for s in scores}
    _write(out, {"core": core_score(scores), "tasks": results})


@app.command()
def surprisal(
    model: ModelPath,
    text: Annotated[str, typer.Argument(help="The text")],
    context: Annotated[str, typer.Option(help="What stands before the text, and is not counted")] = "",
    region: Annotated[
        list[str] | None, typer.Option(help="Words of the text to sum over; may be repeated")
    ] = None,
    device: Device = "auto",
    out: Json = None,
) -> None:
    """Bits of every token of a text, and of regions of it."""
    from plait.evaluation.surprisal import surprisals

    found = surprisals(_load(model, device), [text], contexts=[context])[0]
    regions = [(words, found.of(words)) for words in region or []]
    made = table("token", "bits")
    for token in found.tokens:
        made.add_row(harmless(repr(text[token.begin : token.end])), f"{token.bits:.3f}")
    made.add_section()
    made.add_row("all", f"{found.bits:.3f}", style="bold")
    for words, part in regions:
        remark = "" if part.exact else " (and the rest of its tokens)"
        made.add_row(harmless(repr(words)) + remark, f"{part.bits:.3f}")
    stdout().print(made)
    _write(
        out,
        {
            "bits": found.bits,
            "tokens": [{"begin": t.begin, "end": t.end, "bits": t.bits} for t in found.tokens],
            "regions": [{"words": w, "bits": r.bits, "exact": r.exact} for w, r in regions],
        },
    )


@app.command("minimal-pairs")
def minimal_pairs(
    model: ModelPath,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="JSONL with sentence_good and sentence_bad (BLiMP)"),
    ],
    device: Device = "auto",
    out: Json = None,
) -> None:
    """How often the good sentence of a pair is likelier than the bad one, by total log-probability."""
    from plait.evaluation.minimal_pairs import accuracies, read_pairs, score_pairs

    asked = [pair for file in files for pair in read_pairs(file)]
    with stderr().status("evaluating"):
        scores = score_pairs(_load(model, device), asked)
    every = sum(score.points for score in scores) / len(scores)
    made = table("test", "accuracy")
    for group, accuracy in accuracies(scores).items():
        made.add_row(harmless(group), f"{accuracy:.3f}")
    made.add_section()
    made.add_row(counted(len(scores), "pair"), f"{every:.3f}", style="bold")
    stdout().print(made)
    _write(out, {"accuracy": every, "pairs": len(scores), "tests": accuracies(scores)})


def _load(path: str, device: str) -> Model:
    from plait import api

    return api.load(path, device)


def _write(path: str | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
