"""A model's stack in numbers, from a model on the meta device: no memory is allocated, whatever its size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from plait.cli.terminal import number, size, table
from plait.models.model import Model


@dataclass(frozen=True)
class Layer:
    """One row: a block, or what stands before and after the blocks."""

    name: str
    kind: str
    mixer: int  # parameters
    mlp: int
    parameters: int  # all of them: mixer, MLP, norms
    flops: float  # a token
    state: int | None  # bytes a sequence; None: it keeps none


@dataclass(frozen=True)
class Stack:
    """The rows of a model and their sums, for sequences of ``length`` tokens."""

    layers: list[Layer]
    parameters: int
    flops: float
    state: int | None  # None: some layer keeps no state, so there is no cache
    length: int
    parts: dict[str, int]  # parameters by what they are for


def stack_of(model: Model, length: int) -> Stack:
    """The stack of a model; FLOPs (two a multiply-add) are of a forward, averaged over ``length`` tokens."""
    rows = [Layer("", "embedding", 0, 0, _count([model.embedding]), 0.0, None)]
    for index, block in enumerate(model.blocks):
        mixer, mlp = _count([block.mixer]), _count([block.mlp])
        state = block.mixer.state_bytes(1, length, model.dtype) if block.mixer.stateful else None
        flops = block.flops(length) / length
        rows.append(Layer(str(index), block.kind, mixer, mlp, _count([block]), flops, state))
    total = _count([model])
    flops = model.flops(length) / length
    rest = total - sum(row.parameters for row in rows)
    head = model.config.head.kind
    rows.append(Layer("", f"norm, {head} head", 0, 0, rest, flops - sum(row.flops for row in rows), None))
    states = [row.state for row in rows[1:-1]]
    state = sum(known) if len(known := [s for s in states if s is not None]) == len(states) else None
    return Stack(rows, total, flops, state, length, _parts(model, rows, total))


def stack_table(stack: Stack) -> Table:
    """The stack as a table with its sums; equal neighbours share a row."""
    made = table("layer", "kind", "mixer", "MLP", "parameters", "FLOPs a token", "state", left=2)
    for first, last, row in _runs(stack.layers):
        several = last is not first
        made.add_row(
            f"{first.name} - {last.name}, each" if several else row.name,
            row.kind,
            number(row.mixer) if row.mixer else "",
            number(row.mlp) if row.mlp else "",
            number(row.parameters),
            number(row.flops) if row.flops else "",
            "" if not row.name else "none" if row.state is None else size(row.state),
        )
    made.add_section()
    made.add_row(
        "all",
        "",
        "",
        "",
        number(stack.parameters),
        number(stack.flops),
        "none" if stack.state is None else size(stack.state),
        style="bold",
    )
    return made


def parts_line(stack: Stack) -> str:
    """Parameters by part, with their shares: ``mamba2 1.2M (40%), ...``."""
    return ", ".join(
        f"{name} {number(n)} ({n / stack.parameters:.0%})" for name, n in stack.parts.items() if n
    )


def _runs(layers: list[Layer]) -> list[tuple[Layer, Layer, Layer]]:
    """Neighbours that differ in their number alone: (first, last, one of them)."""
    runs: list[tuple[Layer, Layer, Layer]] = []
    for row in layers:
        if runs and row.name and runs[-1][2].name and _same(row, runs[-1][2]):
            runs[-1] = (runs[-1][0], row, row)
        else:
            runs.append((row, row, row))
    return runs


def _same(a: Layer, b: Layer) -> bool:
    return (a.kind, a.mixer, a.mlp, a.parameters, a.flops, a.state) == (
        b.kind,
        b.mixer,
        b.mlp,
        b.parameters,
        b.flops,
        b.state,
    )


def _parts(model: Model, rows: list[Layer], total: int) -> dict[str, int]:
    parts = {"embedding": rows[0].parameters}
    for row in rows[1:-1]:
        parts[row.kind] = parts.get(row.kind, 0) + row.mixer
    parts["MLPs"] = sum(row.mlp for row in rows)
    head = _count([model.head]) if model.head is not None else 0
    if model.config.head.tie and model.config.head.kind in ("lm", "masked_lm"):
        head -= model.embedding.tokens.weight.numel()
    parts["head"] = head
    parts["norms"] = total - sum(parts.values())
    return parts


def _count(modules: Iterable[nn.Module | None]) -> int:
    found = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
    return sum(found.values())
