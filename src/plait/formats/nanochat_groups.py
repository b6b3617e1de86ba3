"""Which tensors nanochat's optimizers hold together, in which order: the numbering of their state dicts.

October 2025   AdamW: lm_head | wte.   Muon: the blocks' matrices by their numbers of values; over several
               processes by their shapes
July 2026      one optimizer: AdamW's lm_head | wte | value_embeds | resid_lambdas | x0_lambdas | smear_gate,
               smear_lambda, backout_lambda; then Muon's, the blocks' matrices by their shapes
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from plait.config.errors import CheckpointError
from plait.config.schema import ModelConfig
from plait.formats.nanochat_layout import SYSTEM, Shaped, links

Group = tuple[Shaped, ...]

_BLOCKS = "transformer.h."
_OCTOBER = (("lm_head.weight",), ("transformer.wte.weight",))
_SCALARS = (("resid_lambdas",), ("x0_lambdas",), ("smear_gate.weight", "smear_lambda", "backout_lambda"))


def is_july(config: ModelConfig) -> bool:
    """Whether a model that nanochat can express is one of July 2026."""
    return config.backout


def refuse_hybrid(config: ModelConfig) -> None:
    """CheckpointError for a model with a Mamba layer, which nanochat's optimizers cannot train."""
    for index, layer in enumerate(config.layers()):
        if layer.kind != "attention":
            raise CheckpointError(
                f"{SYSTEM}'s Muon takes matrices alone, so it has no state for layer {index}, a {layer.kind}"
            )


def adamw_groups(config: ModelConfig) -> list[Group]:
    """AdamW's groups."""
    shapes = _shapes(config)
    tables = tuple(name for name in shapes if name.startswith("value_embeds."))
    names = (*_OCTOBER, tables, *_SCALARS) if is_july(config) else _OCTOBER
    return [tuple((name, shapes[name]) for name in group) for group in names]


def muon_groups(config: ModelConfig, by_shape: bool) -> list[Group]:
    """Muon's groups: by shape in rising order, or by the number of values in the order of a set of these numbers."""
    members = [(name, shape) for name, shape in _shapes(config).items() if name.startswith(_BLOCKS)]
    if by_shape:
        keys: Iterable[object] = sorted({shape for _, shape in members})
        return [tuple(member for member in members if member[1] == key) for key in keys]
    counts = {count(shape) for _, shape in members}
    return [tuple(member for member in members if count(member[1]) == key) for key in counts]


def count(shape: tuple[int, ...]) -> int:
    """How many values a tensor of that shape has."""
    return torch.Size(shape).numel()


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for link in links(config) for name, shape in link.theirs}
