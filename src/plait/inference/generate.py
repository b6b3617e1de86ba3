"""Generation: prompts in, their continuations out; composed of prefill, decode and sample.

Each row of a batch ends for itself, at an end token, a stop string or the last token asked for; when half of
the rows have ended, the batch goes on with the others alone. ``generate`` gives everything at the end,
``stream_generate`` each piece as soon as it is certain, ``complete`` every row with the reason why it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plait.config.errors import ConfigError, DataError
from plait.inference.decoding import check_generates, check_positions, evaluating, start
from plait.inference.options import GenerateOptions
from plait.inference.prompts import PromptBatch, Prompts, read_prompts, with_prompts
from plait.inference.sampling import INVALID, Uniforms, sample
from plait.inference.text import Finish, Row
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer

# (row, the token that was drawn for it) -> the token that it takes; rows that have ended may be asked for, too.
Steer = Callable[[int, int], int]


@dataclass(frozen=True)
class Piece:
    """What one row has newly written; the pieces of a row, joined, are its completion."""

    row: int  # prompt * num_samples + sample
    ids: list[int]
    text: str  # "" without a tokenizer
    finish: Finish | None = None  # set on a row's last piece


@dataclass(frozen=True)
class Completion:
    """What one row wrote after its prompt, and why it ended there: "eos", "stop" or "length"."""

    ids: list[int]  # with the end token, without the tokens of a stop string
    text: str  # "" without a tokenizer
    finish: Finish


def generate(
    model: Model,
    prompts: Prompts,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[Piece], object] | None = None,
    **options: Any,
) -> Any:
    """Continue prompts; the further keywords are the fields of ``GenerateOptions``.

    A tensor of ids (B, T), with pads where ``attention_mask`` is 0, gives a tensor (B * num_samples, T + new)
    of the rows as they came, what each wrote, and pads after its end. Anything else gives only what was
    written, in the form of the prompts: a list of lists of ids for such a list, a list of texts for a list of
    texts, a text for a text, a list of ids for one (in a list, if ``num_samples`` is above 1). ``tokenizer``
    defaults to the model's. ``stream`` is called with each ``Piece`` as it comes. The model is in eval mode
    meanwhile.

    Raises BuildError for a model that cannot generate, CapacityError if its learned positions do not suffice,
    ConfigError and DataError for options and prompts that make no sense.
    """
    task = _task(model, prompts, attention_mask, tokenizer, options)
    rows = _complete(task, stream)
    if isinstance(prompts, Tensor):
        return with_prompts(
            prompts, [row.ids for row in rows], task.options.pad_token(task.tokenizer, task.ends)
        )
    written = [row.text if task.batch.text else row.ids for row in rows]
    return written[0] if task.batch.single and task.options.num_samples == 1 else written


def complete(
    model: Model,
    prompts: Prompts,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> list[Completion]:
    """As ``generate``, but for any form of prompts a list of each row's ids, text and reason to end."""
    return _complete(_task(model, prompts, attention_mask, tokenizer, options), None)


def stream_generate(
    model: Model,
    prompts: Prompts,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    steer: Steer | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """As ``generate``, piece by piece: never half a character, nor a part of a stop string.

    ``steer`` is asked at every token which one a row takes instead of the one that was drawn. Mistakes raise at
    once, not at the first piece. The model is in eval mode from the first piece until the iterator is exhausted or
    closed.
    """
    task = _task(model, prompts, attention_mask, tokenizer, options)
    return _run(replace(task, steer=steer), at_once=True)


@dataclass(frozen=True)
class _Task:
    """A generation, checked and ready to run."""

    model: Model
    batch: PromptBatch
    tokenizer: Tokenizer | None
    options: GenerateOptions
    ends: frozenset[int]
    seeds: list[int]
    steer: Steer | None = None

    @property
    def known(self) -> int:
        """How many ids may be drawn: a model may have more of them than its tokenizer, which stand for nothing."""
        sizes = [self.model.vocab_size] + ([] if self.tokenizer is None else [self.tokenizer.vocab_size])
        return min(sizes)


def _task(
    model: Model,
    prompts: Prompts,
    attention_mask: Tensor | None,
    tokenizer: Tokenizer | None,
    options: dict[str, Any],
) -> _Task:
    wanted = GenerateOptions.of(options)
    if tokenizer is None:
        tokenizer = model.tokenizer
    check_generates(model)
    batch = read_prompts(
        prompts, model.vocab_size, tokenizer, attention_mask=attention_mask, add_bos=wanted.add_bos
    )
    check_positions(model, max(map(len, batch.ids), default=0), wanted.max_new_tokens)
    if wanted.stops and tokenizer is None:
        raise ConfigError("stop strings need a tokenizer, and the model has none: give tokenizer=")
    ends = wanted.end_tokens(tokenizer, model.vocab_size)
    return _Task(model, batch, tokenizer, wanted, ends, wanted.seeds(len(batch.ids)))


def _complete(task: _Task, stream: Callable[[Piece], object] | None) -> list[Completion]:
    count = len(task.seeds)
    ids: list[list[int]] = [[] for _ in range(count)]
    texts: list[list[str]] = [[] for _ in range(count)]
    ends: list[Finish] = ["length"] * count
    for piece in _run(task, at_once=stream is not None):
        ids[piece.row] += piece.ids
        texts[piece.row].append(piece.text)
        if piece.finish is not None:
            ends[piece.row] = piece.finish
        if stream is not None:
            stream(piece)
    return [Completion(i, "".join(t), e) for i, t, e in zip(ids, texts, ends, strict=True)]


def _run(task: _Task, *, at_once: bool) -> Iterator[Piece]:
    """Prefill, then sample and decode.

    Tokens are read back to the host at every step only if something depends on them, else once at the end.
    """
    options = task.options
    samples, last = options.num_samples, options.max_new_tokens
    prompts = [prompt for prompt in task.batch.ids for _ in range(samples)]
    if not prompts or last == 0:
        return
    watched = at_once or bool(task.ends or options.stops)
    rows = [Row(task.tokenizer, prompt, options.stops) for prompt in prompts]
    alive = list(range(len(rows)))  # the rows that the batch still holds
    with evaluating(task.model):
        state = start(
            task.model,
            task.batch.ids,
            last,
            samples=samples,
            chunk=options.prefill_chunk,
            use_cache=options.use_cache,
            graphs=options.graphs,
        )
        seen = _tokens_seen(prompts, state.logits) if options.penalizes else None
        uniforms = None if options.greedy else Uniforms(task.seeds, state.logits.device)
        waiting: list[Tensor] = []
        for number in range(1, last + 1):
            uniform = None if uniforms is None else uniforms.next()
            logits = state.logits[:, : task.known]
            ids = sample(
                logits, options, uniform=uniform, seen=None if seen is None else seen[:, : task.known]
            )
            if task.steer is not None:
                ids = ids.new_tensor([task.steer(row, token) for row, token in zip(alive, ids.tolist())])
            waiting.append(ids)
            if watched or number == last:
                yield from _read(waiting, rows, alive, task.ends, is_last=number == last)
                kept = [place for place, row in enumerate(alive) if rows[row].finish is None]
                if not kept:
                    return
                if len(kept) <= len(alive) // 2:
                    alive, ids = [alive[place] for place in kept], ids[kept]
                    state.keep(kept)
                    seen = None if seen is None else seen[kept]
                    if uniforms is not None:
                        uniforms.keep(kept)
            ids = ids.clamp(min=0)
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            state.feed(ids)


def _read(
    waiting: list[Tensor], rows: list[Row], alive: list[int], ends: frozenset[int], *, is_last: bool
) -> Iterator[Piece]:
    """Give the waiting tokens, one tensor a step, to their rows; one transfer from the device for all."""
    steps = torch.stack(waiting).tolist()
    waiting.clear()
    for number, tokens in enumerate(steps, 1):
        for row, token in zip(alive, tokens, strict=True):
            if rows[row].finish is not None:
                continue
            if token == INVALID:
                raise DataError(f"the logits of row {row} are not finite: the model's weights are damaged")
            ids, text = rows[row].push(token, eos=token in ends, last=is_last and number == len(steps))
            if ids or text or rows[row].finish is not None:
                yield Piece(row, ids, text, rows[row].finish)


def _tokens_seen(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """(rows, V) bool: the tokens that each row holds."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen.to(logits.device)
