"""``plait demo``: from nothing to a trained model that writes, on text that every machine with Python has."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.overrides import EPILOG, ConfigCommand, overrides
from plait.cli.terminal import number, seconds, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from plait.config.schema import Config
    from plait.training import TrainResult

RECIPE = "demo"
PROMPT = "def read_lines(path):\n"
SAMPLE_TOKENS = 400
RESULT = "demo.json"
app = typer.Typer(add_completion=False)


@app.command(cls=ConfigCommand, epilog=EPILOG)
def demo(
    ctx: typer.Context,
    minutes: Annotated[float | None, typer.Option(help="Time to train; by default the recipe's")] = None,
    out: Annotated[
        str, typer.Option(help="The run's folder; an earlier demo in it is replaced")
    ] = "runs/demo",
) -> None:
    """Train a small byte-level hybrid of Mamba and attention on the source of Python's standard library.

    At the end: bits per byte on files that were held out, beside gzip and xz; the loss curve; a sample; what to
    type next.
    """
    from plait.config.load import load_config
    from plait.training import train

    console = stdout()
    changes = [f"--training.out={out}", *([] if minutes is None else [f"--training.minutes={minutes}"])]
    config = load_config(RECIPE, [*changes, *overrides(ctx)])
    console.print("measuring which precision is faster here ...", style="dim")
    config = config.replace(training=config.training.replace(precision=_faster_precision(config)))
    _describe(config, console)
    result = train(config, overwrite=True)
    console.print("\nreading the held-out files, each byte predicted once ...", style="dim")
    scores = _scores(result, config)
    _report(result, scores, console)


def _faster_precision(config: Config) -> str:
    """The precision in which this machine trains this model faster: measured, since CPUs differ tenfold.

    It also compiles the CPU kernels, so that no training time goes into that.
    """
    import torch

    from plait.api import build
    from plait.training.precision import autocast

    model = build(config)
    ids = torch.randint(256, (2, config.data.sequence_length), generator=torch.Generator().manual_seed(0))
    took: dict[str, float] = {}
    for _ in range(3):  # the first warms up
        for precision in ("fp32", "bf16"):
            begin = perf_counter()
            with autocast(precision, torch.device("cpu")):
                loss = model(ids, labels=ids).loss
            loss.backward()
            took[precision] = perf_counter() - begin
    return min(took, key=lambda precision: took[precision])


def _describe(config: Config, console: Console) -> None:
    from plait.cli.source import with_vocabulary
    from plait.models.model import Model

    described, _ = with_vocabulary(config)
    total = Model(described, device="meta").parameter_counts()["total"]
    training = config.training
    console.print(
        f"[bold]Plait demo[/]: {config.model.pattern} (M2 Mamba-2, T attention), {number(total)} parameters, on the "
        "source of Python's standard library, byte by byte;\n"
        f"{training.minutes:g} minutes of training in {training.precision}, whole files held out. "
        "Ctrl-C saves and stops.",
        markup=True,
    )


def _scores(result: TrainResult, config: Config) -> dict[str, float]:
    """Bits per byte on the held-out files, of the model and of the compressors."""
    from plait.data.documents import read_documents
    from plait.evaluation.bits_per_byte import bits_per_byte, joined
    from plait.evaluation.compressors import compressed_bits_per_byte

    data = config.data
    assert data.train is not None
    held_out = read_documents(data.train, split="validation", fraction=data.validation_fraction)
    texts = list(joined(held_out))
    score = bits_per_byte(result.model, texts, tokenizer=result.tokenizer)
    return {"plait": score.bits_per_byte, **compressed_bits_per_byte(texts), "bytes": float(score.n_bytes)}


def _report(result: TrainResult, scores: dict[str, float], console: Console) -> None:
    from plait.inference.generate import generate

    n_bytes = scores.pop("bytes")
    made = table("", "bits per byte", "", title=f"{number(n_bytes)} bytes of held-out files")
    rows = {
        "plait": f"this model, {seconds(result.elapsed)} of training; the context begins anew in each file",
        "gzip -9": "all files in one stream, its best case",
        "xz -9e": "all files in one stream, its best case",
    }
    for name, remark in rows.items():
        made.add_row(name, f"{scores[name]:.3f}", remark, style="bold" if name == "plait" else None)
    console.print()
    console.print(made)
    prompt = PROMPT
    text = generate(
        result.model,
        prompt,
        tokenizer=result.tokenizer,
        max_new_tokens=SAMPLE_TOKENS,
        temperature=0.7,
        top_p=0.95,
        seed=0,
    )
    console.print("a sample, after the first line:", style="dim")
    console.print(f"{prompt}{text}\n")
    run = result.run
    picture = _picture(run, console)
    summary = {
        "bits_per_byte": scores["plait"],
        **{name: bits for name, bits in scores.items() if name != "plait"},
        "held_out_bytes": int(n_bytes),
        "seconds": result.elapsed,
        "tokens": result.tokens,
        "steps": result.step,
    }
    (run / RESULT).write_text(json.dumps(summary, indent=1) + "\n")
    where = shlex.quote(str(run))
    if picture is not None:
        console.print(f"loss curve  {picture}")
    console.print(f"the run     {run}\n")
    console.print("next:", style="bold")
    console.print(f"  plait generate {where} 'class Stack:'")
    console.print(f"  plait train --resume {where} --training.minutes=10")


def _picture(run: Path, console: Console) -> Path | None:
    """The loss curve as a PNG, if matplotlib is here."""
    from plait.config.errors import PlaitError
    from plait.training.plot import plot_run

    try:
        return plot_run(run)
    except PlaitError as error:
        console.print(f"no loss curve: {error}", style="dim")
        return None
