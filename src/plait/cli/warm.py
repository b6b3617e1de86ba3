"""Compile ahead of time what the first step of training or of generation would wait for: ``plait doctor --warm``.

Kernels are compiled for dtypes and for sizes of states, not for lengths or widths, and both Numba and Triton keep what
they made. So one pass of each kind of layer, with few tokens, fills their caches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from plait.config.pattern import parse_pattern
from plait.config.schema import ModelConfig
from plait.models.model import Model
from plait.training.precision import autocast

EVERY_KIND = "M M2 M3 S4D T"
"""What is compiled for if no model is named: the kinds that have kernels of their own."""
Precision = Literal["fp32", "bf16"]
_VOCABULARY = 64
_LENGTHS = (70, 1, 37)  # packed; and as many tokens in each row of a dense batch as the first
_NEW = 5


def warm(model: ModelConfig | None, places: list[torch.device]) -> Iterator[tuple[str, float]]:
    """For each place and precision: its name, and the seconds that it took.

    ``model`` None: one layer of each kind with its default options. Layers that are alike are run once.
    """
    config = one_of_each(ModelConfig(pattern=EVERY_KIND) if model is None else model)
    for place in places:
        for precision in get_args(Precision):
            begin = time.perf_counter()
            built = Model(config, device=place)
            _learn(built, precision)
            if built.stateful and config.head.kind == "lm":
                _write(built.to(torch.bfloat16) if precision == "bf16" else built)
            yield f"{place.type}, {precision}", time.perf_counter() - begin


def one_of_each(model: ModelConfig) -> ModelConfig:
    """The same model with one layer of each kind and options, and few ids."""
    entries = parse_pattern("attention" if model.pattern is None else model.pattern)
    distinct = {repr((e.kind, sorted(e.options.items()))): {"mixer": e.kind, **e.options} for e in entries}
    return model.replace(pattern=list(distinct.values()), n_layer=None, vocab_size=_VOCABULARY)


def _learn(model: Model, precision: Precision) -> None:
    """Forward and backward over packed documents, as training has them, and over a dense batch."""
    device = model.device
    bounds = [sum(_LENGTHS[:i]) for i in range(len(_LENGTHS) + 1)]
    packed = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=device), "max_len": max(_LENGTHS)}
    for shape, layout in (((1, bounds[-1]), packed), ((2, _LENGTHS[0]), {})):
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        with autocast(precision, device):
            hidden = model(ids, **layout).hidden
        hidden.float().sum().backward()
        model.zero_grad()


def _write(model: Model) -> None:
    """A prompt, and tokens one by one."""
    model.eval()
    cache = model.new_cache(2, _LENGTHS[0] + _NEW)
    model.step(torch.zeros(2, _LENGTHS[0], dtype=torch.int64, device=model.device), cache)
    for _ in range(_NEW):
        model.step(torch.zeros(2, 1, dtype=torch.int64, device=model.device), cache)
