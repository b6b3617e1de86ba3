"""What each token of each document costs a causal model: each predicted once, from its own document alone.

A document that fits into the context goes through the model in one piece, packed with others of like length.
A longer one goes in chunks. *Carried*: through the cache, so the states of recurrent layers reach back to the
document's beginning and the keys and values of attention up to ``max_context`` tokens; several documents side
by side, each lane taking the next one when its document ends, so memory does not grow with the documents.
*Windows*, for models with learned positions or layers without state: overlapping pieces of ``max_context``
tokens, each run from nothing, of which the second half is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.config.errors import ConfigError
from plait.inference.decoding import check_generates, evaluating
from plait.mixers.attention import Attention
from plait.mixers.contract import Mixer
from plait.models.cache import Cache
from plait.models.model import Model

_BATCH_TOKENS = 8192
_BATCH_LOGITS = 1 << 25  # logits of one call: 128 MiB in float32
_CHUNK = 512  # tokens of a document a call, and more when fewer documents are left
_WHOLE = 1 << 16  # tokens of the longest document that attention takes in one piece
_HELD_TOKENS = 1 << 18  # keys and values of all lanes together, where whole documents are kept


@dataclass(frozen=True)
class _Piece:
    """Tokens ``begin`` to ``end`` of a document, of which those from ``count`` on are counted."""

    document: int
    begin: int
    end: int
    count: int


def token_losses(
    model: Model,
    documents: Sequence[Sequence[int] | np.ndarray | Tensor],
    *,
    start: int | None,
    max_context: int | None = None,
    carry: bool | None = None,
    batch_tokens: int | None = None,
) -> list[Tensor]:
    """Nats of every token of every document, one vector a document, on the host.

    Documents are ids without special tokens; ``start`` (bos) stands before each as its context. Without one a
    document's first token costs what it costs to guess it, ln(V). ``max_context``: the most tokens that
    attention looks back (while carried, between half and all of it); None: the whole document. ``carry``: see
    above; None: wherever the model can. ``batch_tokens``: tokens a call, which bounds the memory.
    """
    return token_scores(
        model, documents, start=start, max_context=max_context, carry=carry, batch_tokens=batch_tokens
    )[0]


def token_scores(
    model: Model,
    documents: Sequence[Sequence[int] | np.ndarray | Tensor],
    *,
    start: int | None,
    max_context: int | None = None,
    carry: bool | None = None,
    batch_tokens: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """As ``token_losses``, and beside them for every token whether it is the one the model thinks likeliest."""
    check_generates(model)
    if max_context is not None and max_context < 2:
        raise ConfigError(f"max_context is {max_context}; it must be at least 2, or None for whole documents")
    if carry and not can_carry(model):
        raise ConfigError("carry is set, but the model has learned positions or a layer that keeps no state")
    carry = can_carry(model) if carry is None else carry
    budget = batch_tokens or max(_CHUNK, min(_BATCH_TOKENS, _BATCH_LOGITS // model.vocab_size))
    grows = not all(_bounded(mixer) for mixer in model.mixers)
    texts = [torch.as_tensor(np.asarray(document, dtype=np.int64)) for document in documents]
    hits = [torch.zeros(len(text), dtype=torch.bool) for text in texts]
    run = _Run(model, texts, start, _no_losses(model, texts, start), hits)
    sizes = [run.length(i) for i in range(len(texts))]
    order = sorted(range(len(texts)), key=lambda i: sizes[i])
    with torch.no_grad(), evaluating(model):
        if carry:
            # a recurrence likes many sequences side by side, attention without a cache whole documents
            most = batch_tokens or max(budget, min(_WHOLE, _BATCH_LOGITS // model.vocab_size))
            fits = (max_context or most) if grows else _CHUNK
            whole = [_Piece(i, 0, sizes[i], 0) for i in order if 0 < sizes[i] <= fits]
            long = [i for i in reversed(order) if sizes[i] > fits]
        else:
            window = _window(model, max_context)
            whole = [piece for i in order for piece in _windows(i, sizes[i], window)]
            long = []
        for batch in _batches(whole, budget):
            run.forward(batch)
        if long:
            run.carried(long, budget, max_context, grows)
    return run.losses, run.hits


def can_carry(model: Model) -> bool:
    """Whether a document's state can be carried from chunk to chunk, whatever its length."""
    learned = model.config.embedding.position == "learned"
    return model.stateful and not learned and all(_bounded(m) or _is_ring(m) for m in model.mixers)


def _no_losses(model: Model, texts: Sequence[Tensor], start: int | None) -> list[Tensor]:
    """NaN until a token has been predicted; without a start the first one is guessed."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    losses = [torch.full((len(text),), math.nan, dtype=dtype) for text in texts]
    if start is None:
        for cost in losses:
            cost[:1] = math.log(model.vocab_size)
    return losses


@dataclass
class _Run:
    """Documents on their way through a model; ``losses`` and ``hits`` are filled in piece by piece."""

    model: Model
    texts: list[Tensor]
    start: int | None
    losses: list[Tensor]
    hits: list[Tensor]

    def length(self, document: int) -> int:
        """How many tokens of a document are predicted, and as many are read."""
        return max(0, len(self.texts[document]) - (self.start is None))

    def inputs(self, piece: _Piece) -> Tensor:
        """The tokens that the model reads to predict a piece: those one place before it."""
        text = self.texts[piece.document]
        if self.start is None:
            return text[piece.begin : piece.end]
        if piece.begin:
            return text[piece.begin - 1 : piece.end - 1]
        return torch.cat([torch.tensor([self.start]), text[: max(0, piece.end - 1)]])

    def targets(self, piece: _Piece) -> Tensor:
        """The tokens of a piece."""
        skip = int(self.start is None)
        return self.texts[piece.document][piece.begin + skip : piece.end + skip]

    def forward(self, pieces: Sequence[_Piece]) -> None:
        """Run pieces from nothing, side by side."""
        ids, bounds = _side_by_side([self.inputs(p) for p in pieces], self.model.device)
        self.take(pieces, self.model(ids, cu_seqlens=bounds).logits)

    def take(self, pieces: Sequence[_Piece], logits: Tensor) -> None:
        """Note the cost of pieces from their logits, (1, n, V) or (S, T, V)."""
        targets = torch.cat([self.targets(p) for p in pieces]).to(logits.device)
        flat = logits.flatten(0, 1)
        nats = F.cross_entropy(
            flat if flat.dtype == torch.float64 else flat.float(), targets, reduction="none"
        )
        hits = flat.argmax(-1) == targets
        skip, sizes = int(self.start is None), [p.end - p.begin for p in pieces]
        for kept, found in ((self.losses, nats), (self.hits, hits)):
            for piece, part in zip(pieces, found.cpu().split(sizes), strict=True):
                counted = part[piece.count - piece.begin :]
                kept[piece.document][piece.count + skip : piece.end + skip] = counted

    def carried(self, documents: Sequence[int], budget: int, window: int | None, grows: bool) -> None:
        """Run documents in chunks, each lane of the cache one document after another."""
        longest = self.length(documents[0])
        most = window // 2 if window is not None and grows else budget  # tokens of a document a call
        lanes = min(len(documents), budget // min(_CHUNK, most))
        if grows:
            lanes = min(lanes, _HELD_TOKENS // (window or longest))
        lanes = max(1, lanes)
        blank = _ring_cache(self.model, 1, longest, window)
        cache = _ring_cache(self.model, lanes, longest, window)
        waiting = list(reversed(documents))
        at: list[tuple[int, int]] = [(waiting.pop(), 0) for _ in range(lanes)]
        while at:
            size = max(1, min(most, budget // len(at)))
            pieces = [_Piece(i, a, min(a + size, self.length(i)), a) for i, a in at]
            ids, bounds = _side_by_side([self.inputs(p) for p in pieces], self.model.device)
            self.take(pieces, self.model.step(ids, cache, cu_seqlens=bounds))
            at = [(p.document, p.end) for p in pieces]
            for lane, (document, done) in enumerate(at):
                if done == self.length(document) and waiting:
                    at[lane] = (waiting.pop(), 0)
                    _reset(cache, lane, blank)
            busy = [lane for lane, (document, done) in enumerate(at) if done < self.length(document)]
            if len(busy) < len(at):
                at, cache = [at[lane] for lane in busy], cache.select(busy)


def _window(model: Model, max_context: int | None) -> int | None:
    embedding = model.config.embedding
    limits = [max_context, embedding.max_positions if embedding.position == "learned" else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _windows(document: int, length: int, window: int | None) -> Iterator[_Piece]:
    if length == 0:
        return
    end = length if window is None else min(window, length)
    yield _Piece(document, 0, end, 0)
    while window is not None and end < length:
        done, end = end, min(end + window // 2, length)
        yield _Piece(document, end - window, end, done)


def _batches(pieces: Sequence[_Piece], budget: int) -> Iterator[list[_Piece]]:
    """Consecutive pieces of at most ``budget`` tokens together, or one piece alone."""
    batch: list[_Piece] = []
    held = 0
    for piece in pieces:
        size = piece.end - piece.begin
        if batch and held + size > budget:
            yield batch
            batch, held = [], 0
        batch.append(piece)
        held += size
    if batch:
        yield batch


def _side_by_side(pieces: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Dense (S, T) and None if all are equally long, else one row (1, n) and its bounds (S+1,)."""
    if len({len(p) for p in pieces}) == 1:
        return torch.stack(list(pieces)).to(device), None
    bounds = torch.tensor([0, *accumulate(len(p) for p in pieces)], dtype=torch.int32)
    return torch.cat(list(pieces))[None].to(device), bounds


def _ring_cache(model: Model, n_seq: int, longest: int, window: int | None) -> Cache:
    """A cache for documents of up to ``longest`` tokens in which attention keeps only the last ``window``.

    Attention writes position p to slot p mod R of its R slots, and so forgets the oldest by itself when there
    are fewer slots than positions. Layers with a window of their own keep that.
    """
    states = []
    for mixer in model.mixers:
        slots = longest if window is None or _bounded(mixer) else min(window, longest)
        states.append(mixer.init_state(n_seq, slots, model.device, model.dtype))
    return Cache(states, torch.zeros(n_seq, dtype=torch.int64, device=model.device), [0] * n_seq, longest)


def _reset(cache: Cache, lane: int, blank: Cache) -> None:
    """Make a lane as it was before its first token."""
    for state, first in zip(cache.states, blank.states, strict=True):
        for name, tensor in state.items():
            tensor[lane] = first[name][0]
    cache.positions[lane] = 0
    cache.lengths[lane] = 0


def _bounded(mixer: Mixer) -> bool:
    """Whether a layer's state stays as large as it is, however many tokens come."""
    large = 1 << 24
    return mixer.state_bytes(1, large) == mixer.state_bytes(1, 2 * large)


def _is_ring(mixer: Mixer) -> bool:
    return isinstance(mixer, Attention)
