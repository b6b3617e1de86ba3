"""Prefill and decode: from prompts, or one more token a row, to the logits of the next token.

``Cached`` and ``Recomputed`` are these two steps for a batch of rows: the first through the model's cache,
the second, for layers that keep no state, by running over the whole text again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError, CapacityError
from plait.inference.graphs import StepGraphs, say_why_not, usable
from plait.mixers.constants import Table, held
from plait.models.block import Block
from plait.models.cache import Cache
from plait.models.model import Model


@torch.no_grad()
def prefill(
    model: Model, prompts: Sequence[Sequence[int]], cache: Cache, *, chunk: int | None = None
) -> Tensor:
    """Run prompts of any lengths into a cache of one sequence a prompt: (S, V), the logits after each.

    No pads: prompts of different lengths lie packed in one row. With ``chunk``, no call takes more than so
    many tokens of a prompt, which bounds the memory. The cache may hold earlier tokens; a prompt without
    tokens leaves its sequence as it was, and its logits mean nothing.
    """
    longest = max(map(len, prompts), default=0)
    cache.check_room([len(p) for p in prompts])
    size = chunk or max(1, longest)
    logits: Tensor | None = None
    for a in range(0, max(1, longest), size):
        pieces = [p[a : a + size] for p in prompts]
        new = _step(model, pieces, cache)
        if logits is None:
            logits = new
        else:
            moved = torch.tensor([bool(p) for p in pieces], device=new.device)
            logits = torch.where(moved[:, None], new, logits)
    assert logits is not None
    return logits


@torch.no_grad()
def decode(model: Model, ids: Tensor, cache: Cache) -> Tensor:
    """One more token a sequence, ids (S,): (S, V), the logits of the token after it."""
    return model.step(ids[:, None], cache, last_only=True)


@torch.no_grad()
def recompute(model: Model, texts: Sequence[Sequence[int]]) -> Tensor:
    """(S, V), the logits after whole texts, none of them empty, without any cache."""
    ids, bounds = _pack(texts, model.device)
    logits = model(ids, cu_seqlens=bounds).logits
    return logits[0, (bounds[1:] - 1).to(logits.device), : model.vocab_size]


def check_generates(model: Model) -> None:
    """Raise BuildError, with the layer's name, if the model cannot generate."""
    for index, block in _layers(model):
        if not block.mixer.causal:
            raise BuildError(
                f"layer {index} ({block.kind}) is not causal, so the model cannot generate: each token would "
                "depend on those after it"
            )
    if model.config.head.kind != "lm":
        raise BuildError(f"a model with a {model.config.head.kind} head cannot generate; it takes an lm head")


def check_positions(model: Model, longest: int, max_new_tokens: int) -> None:
    """Raise CapacityError if the model's learned positions do not suffice for the longest row."""
    most = model.config.embedding.max_positions
    # the last token is written, but never read
    if model.config.embedding.position == "learned" and longest + max_new_tokens - 1 > most:
        raise CapacityError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {most} learned "
            f"positions: ask for at most {max(0, most - longest + 1)} new tokens or shorten the prompt"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class Cached:
    """A batch of rows and its cache; ``samples`` rows go on from each prompt, which is run once.

    With ``graphs`` steps are recorded and replayed, unless a layer cannot be; ``feed`` then overwrites ``logits``.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        samples: int,
        chunk: int | None,
        graphs: bool = False,
    ) -> None:
        self._model = model
        self._cache = model.new_cache(len(prompts), capacity)
        self._graphs = graphs
        self._recorded: StepGraphs | None = None
        self._constants: Table = {}
        self.logits = prefill(model, prompts, self._cache, chunk=chunk)  # (rows, V)
        if samples > 1:
            self.keep([row for row in range(len(prompts)) for _ in range(samples)])

    def feed(self, ids: Tensor) -> None:
        """One more token a row, (rows,)."""
        if self._graphs:
            try:
                self._recorded = self._recorded or StepGraphs(self._model, self._cache)
                self.logits = self._recorded(ids)
                return
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                say_why_not(str(error).splitlines()[0])
                self._graphs, self._recorded = False, None
        with held(self._constants):
            self.logits = decode(self._model, ids, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows; they may repeat."""
        self._recorded = None  # its buffers are those of the rows before
        self._cache = self._cache.select(rows)
        self.logits = self.logits[list(rows)]


class Recomputed:
    """The same without a cache: every token costs a run over the whole text."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], samples: int) -> None:
        self._model = model
        self._texts = [list(prompt) for prompt in prompts for _ in range(samples)]
        self.logits = recompute(model, self._texts)

    def feed(self, ids: Tensor) -> None:
        """One more token a row, (rows,)."""
        for text, token in zip(self._texts, ids.tolist(), strict=True):
            text.append(token)
        self.logits = recompute(self._model, self._texts)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        self._texts = [list(self._texts[row]) for row in rows]
        self.logits = self.logits[list(rows)]


def start(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    samples: int = 1,
    chunk: int | None = None,
    use_cache: bool = True,
    graphs: bool = True,
) -> Cached | Recomputed:
    """The rows after their prompts; warns once if a layer keeps no state, which makes generation slow.

    graphs: on a CUDA device, record the steps, if they are enough to be worth it.
    """
    if use_cache and model.stateful:
        capacity = max(map(len, prompts), default=0) + max_new_tokens
        return Cached(model, prompts, capacity, samples, chunk, graphs and usable(model, max_new_tokens))
    if use_cache:
        index, block = next((i, b) for i, b in _layers(model) if not b.mixer.stateful)
        _say_once(
            f"layer {index} ({block.kind}) keeps no state: each new token costs a run over the whole text"
        )
    return Recomputed(model, prompts, samples)


def _layers(model: Model) -> Iterator[tuple[int, Block]]:
    return enumerate(cast(list[Block], model.blocks))


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _step(model: Model, pieces: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    if len({len(p) for p in pieces}) == 1:
        ids = torch.tensor([list(p) for p in pieces], dtype=torch.int64, device=model.device)
        return model.step(ids.reshape(len(pieces), -1), cache, last_only=True)
    ids, bounds = _pack(pieces, model.device)
    return model.step(ids, cache, cu_seqlens=bounds, last_only=True)


def _pack(pieces: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """One row (1, n) of all pieces, and their bounds (S+1,), which stay on the host, where they are read."""
    ids = torch.tensor([i for piece in pieces for i in piece], dtype=torch.int64, device=device)
    bounds = torch.tensor([0, *accumulate(map(len, pieces))], dtype=torch.int32)
    return ids[None], bounds
