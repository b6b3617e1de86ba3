"""From another system's names of weights to ours, by tables of patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.formats.foreign import unwrapped

Names = Sequence[tuple[str, str]]
"""(a pattern of how their name begins, how ours does); the first that matches counts.

Weights that get the same name of ours are joined by rows, in the table's order.
"""


def renamed(
    tensors: Mapping[str, Tensor],
    names: Names,
    system: str,
    *,
    transposed: str = r"(?!)",
    left_out: str = r"(?!)",
) -> dict[str, Tensor]:
    """Their tensors under our names; those that match ``transposed`` are turned, ``left_out`` ones dropped.

    CheckpointError naming a tensor that no pattern knows.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for theirs, tensor in unwrapped(tensors).items():
        if re.fullmatch(left_out, theirs):
            continue
        place, ours = _ours(theirs, names, system)
        parts.setdefault(ours, {})[place] = tensor.T if re.fullmatch(transposed, theirs) else tensor
    return {ours: _joined(found) for ours, found in parts.items()}


def one_of(tensors: Mapping[str, Tensor], name: str, other: str, system: str) -> dict[str, Tensor]:
    """The tensors with ``name`` alone where the system keeps one tensor under two names; they must be equal."""
    found = dict(tensors)
    if other in found:
        copy = found.pop(other)
        if not torch.equal(found.setdefault(name, copy), copy):
            raise CheckpointError(f"{system}: {other} and {name} differ, though the configuration ties them")
    return found


def _ours(theirs: str, names: Names, system: str) -> tuple[int, str]:
    for place, (pattern, ours) in enumerate(names):
        match = re.match(pattern, theirs)
        if match:
            return place, match.expand(ours) + theirs[match.end() :]
    raise CheckpointError(f"{system}: the tensor {theirs} has no place in a model of this family")


def _joined(found: Mapping[int, Tensor]) -> Tensor:
    return (
        torch.cat([found[place] for place in sorted(found)]) if len(found) > 1 else next(iter(found.values()))
    )
