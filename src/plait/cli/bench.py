"""``plait bench``: time ops, training and decoding on this machine, each checked against the reference first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.terminal import number, stderr, stdout, table
from plait.config.errors import DataError

if TYPE_CHECKING:
    import torch

    from plait.bench.timing import Result

app = typer.Typer(add_completion=False, help="Time ops, training and decoding; each is checked first.")

Device = Annotated[str, typer.Option(help="cpu or cuda; auto: the GPU if there is one")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the rows there, with hardware and versions")]
Peers = Annotated[bool, typer.Option(help="Also other packages, where they are installed")]
Seconds = Annotated[float, typer.Option(help="Of repeats, a measurement")]


@app.command()
def ops(
    names: Annotated[
        list[str] | None, typer.Argument(help="selective_scan, ssd, ...; none: all", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; by default that on a GPU")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Like B1,L1024,D1536,N16; may be given more than once")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; may be given more than once, and leaves peers out"),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of a CPU; may be given more than once, and by default as torch chooses"),
    ] = None,
    seconds: Seconds = 1.0,
    json: Json = None,
) -> None:
    """Time ops forward, and forward with backward, beside their floors."""
    from plait.bench.ops import BENCHES, benchmark_ops

    place = _place(device)
    chosen = names or list(BENCHES)
    for name in chosen:
        _known("op", name, BENCHES)
    shapes = [_shape(text) for text in shape] if shape else None
    if shapes and len(chosen) != 1:
        raise DataError("a shape is of one op; name it: plait bench ops ssd --shape B1,L512,H24,P64,N128")
    columns = (
        "op", "shape", "dtype", "backend", "threads", "forward_ms", "forward_times", "forward_floor", "both_ms",
        "both_times", "both_floor", "backward_forwards",
    )  # fmt: skip
    with stderr().status("measuring") as status:
        result = benchmark_ops(
            chosen, place, _dtype(dtype, place), shapes=shapes, backends=backend, threads=threads,
            seconds=seconds,
            say=lambda row: status.update(f"measured {row['op']} {row['shape']}, {row['backend']}"),
        )  # fmt: skip
    _show(result, columns, 4, json)


@app.command()
def train(
    models: Annotated[list[str] | None, typer.Argument(help="mamba2-370m, transformer-70m, ...")] = None,
    device: Device = "auto",
    size: Annotated[
        list[str] | None, typer.Option(help="Sequences x tokens, like 16x2048; may be given more than once")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default bf16 on a GPU")
    ] = None,
    compile: Annotated[bool, typer.Option(help="torch.compile each block")] = False,
    checkpointing: Annotated[str, typer.Option(help="none, block or selective")] = "none",
    peers: Peers = True,
    by: Annotated[str | None, typer.Option(help="Only this package's models: plait, transformers")] = None,
    apart: Annotated[bool, typer.Option(help="Each row in a process of its own")] = False,
    seconds: Seconds = 10.0,
    json: Json = None,
) -> None:
    """Time training steps of whole models."""
    from plait.bench.train import benchmark_training

    _known("precision", precision or "fp32", ("fp32", "bf16", "fp16"))
    _known("checkpointing", checkpointing, ("none", "block", "selective"))
    columns = (
        "model", "shape", "by", "parameters", "tokens_per_second", "step_ms", "forward_backward_ms", "peak_gib",
        "first_step_s", "first_loss", "backend",
    )  # fmt: skip
    with stderr().status("measuring") as status:
        result = benchmark_training(
            _place(device), models=models, sizes=[_size(s) for s in size] if size else None, precision=precision,
            compiled=compile, checkpointing=checkpointing, peers=peers, by=by, apart=apart, seconds=seconds,
            say=lambda row: status.update(f"measured {row['model']} {row['shape']}, {row['by']}"),
        )  # fmt: skip
    _show(result, columns, 3, json)


@app.command()
def decode(
    models: Annotated[list[str] | None, typer.Argument(help="mamba2-130m, transformer-70m, ...")] = None,
    device: Device = "auto",
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; may be given more than once")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens before what is timed")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that are timed")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; by default that on a GPU")] = None,
    graphs: Annotated[bool, typer.Option(help="Record steps and replay them")] = True,
    peers: Peers = True,
    json: Json = None,
) -> None:
    """Time what a token takes after a prompt, beside the time to read weights and states."""
    from plait.bench.decode import benchmark_decoding

    place = _place(device)
    columns = (
        "model", "shape", "by", "dtype", "step_ms", "times_plait", "floor_ms", "times_floor", "tokens_per_second",
        "prompt_ms", "peak_gib", "backend",
    )  # fmt: skip
    with stderr().status("measuring") as status:
        result = benchmark_decoding(
            place, models=models, batches=batch, prompt=prompt, tokens=tokens, dtype=_dtype(dtype, place),
            graphs=graphs, peers=peers,
            say=lambda row: status.update(f"measured {row['model']} {row['shape']}, {row['by']}"),
        )  # fmt: skip
    _show(result, columns, 4, json)


def _show(result: Result, columns: tuple[str, ...], left: int, path: Path | None) -> None:
    made = table(*(column.replace("_", " ") for column in columns), left=left)
    for row in result.rows:
        made.add_row(*(_cell(column, row) for column in columns))
    stdout().print(made)
    ran = dict.fromkeys((row["model"], row["kernels"]) for row in result.rows if "kernels" in row)
    for model, names in ran:
        stdout().print(f"{model}: {names}", style="dim")
    if path is not None:
        result.write(path)
    failed = [row for row in result.rows if "failed" in row]
    for row in failed:
        who = row.get("by", row.get("backend"))
        stderr().print(f"{row.get('op', row.get('model'))} {row['shape']}, {who}: {row['failed']}")
    if any(row.get("by") == "plait" or row.get("wrong") for row in failed):
        raise typer.Exit(1)


def _cell(column: str, row: dict[str, Any]) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if column in ("parameters", "tokens_per_second"):
        return number(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _place(name: str) -> torch.device:
    from plait.training.distributed import choose_device

    place = choose_device(name)
    return choose_device("cpu") if name == "auto" and place.type == "mps" else place


def _dtype(name: str | None, place: torch.device) -> torch.dtype:
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = name or ("bfloat16" if place.type == "cuda" else "float32")
    _known("dtype", name, kinds)
    return kinds[name]


def _known(what: str, given: str, allowed: Any) -> None:
    if given not in allowed:
        raise DataError(f"{what} is {given!r}; it must be one of {', '.join(allowed)}")


def _size(text: str) -> tuple[int, int]:
    sequences, _, tokens = text.partition("x")
    if not (sequences.isdigit() and tokens.isdigit() and int(sequences) and int(tokens) > 1):
        raise DataError(f"{text!r} is no size; give sequences x tokens of each, like 16x2048")
    return int(sequences), int(tokens)


def _shape(text: str) -> Any:
    from plait.bench.ops import Shape

    sizes: dict[str, int] = {}
    for part in text.split(","):
        if not (part[:1].isalpha() and part[1:].isdigit()):
            raise DataError(f"{text!r} is no shape; give sizes with their letters, like B1,L1024,D1536,N16")
        sizes[part[0]] = int(part[1:])
    if not {"B", "L"} < set(sizes):
        raise DataError(f"the shape {text!r} lacks B (sequences), L (tokens) or the op's widths")
    return Shape(sizes.pop("B"), sizes.pop("L"), sizes)
