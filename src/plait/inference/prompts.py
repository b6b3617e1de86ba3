"""Every form of prompts becomes lists of token ids, and what was generated goes back in the same form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from plait.config.errors import ConfigError, DataError
from plait.tokenizers.base import Tokenizer

Prompts = Tensor | str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as ids, one list a prompt; ``text``: they came as text; ``single``: one came, not in a list."""

    ids: list[list[int]]
    text: bool = False
    single: bool = False


def read_prompts(
    prompts: Prompts,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    *,
    attention_mask: Tensor | None = None,
    add_bos: bool = True,
) -> PromptBatch:
    """Prompts of any form, checked.

    A tensor (B, T) of ids, with pads wherever ``attention_mask`` (B, T) is 0; a list of ids, or of lists or
    vectors of ids, of any lengths; a text or a list of texts, which begin with the tokenizer's bos if it has
    one (as documents do in training), unless ``add_bos`` is False. An empty prompt always begins with bos.
    """
    if attention_mask is not None and not isinstance(prompts, Tensor):
        raise DataError("attention_mask marks the pads of a tensor; prompts in a list need no pads")
    if isinstance(prompts, Tensor):
        batch = PromptBatch(_rows(prompts, attention_mask))
    elif isinstance(prompts, str):
        batch = PromptBatch(_encode([prompts], tokenizer, add_bos), text=True, single=True)
    else:
        batch = _read_list(list(prompts), tokenizer, add_bos)
    bos = None if tokenizer is None else tokenizer.bos_id
    for number, ids in enumerate(batch.ids):
        if not ids:
            if bos is None:
                raise DataError(
                    f"prompt {number} is empty, and there is no tokenizer with a bos token to begin with: "
                    "give at least one token"
                )
            ids.append(bos)
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise DataError(
                f"prompt {number} holds the token {wrong}, which is outside the model's vocabulary "
                f"0 .. {vocab_size - 1}"
            )
    return batch


def _read_list(prompts: list[Any], tokenizer: Tokenizer | None, add_bos: bool) -> PromptBatch:
    if prompts and all(isinstance(p, str) for p in prompts):
        return PromptBatch(_encode(prompts, tokenizer, add_bos), text=True)
    if prompts and all(isinstance(p, int) for p in prompts):
        return PromptBatch([list(prompts)], single=True)
    if any(isinstance(p, str | int) for p in prompts):
        raise DataError("the prompts are of different kinds; give texts only, or lists of ids only")
    vectors = [p.tolist() if isinstance(p, Tensor) else list(p) for p in prompts]
    if not all(isinstance(i, int) for vector in vectors for i in vector):
        raise DataError("a prompt in a list must be a text, or a list or vector of whole numbers")
    return PromptBatch(vectors)


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if ids.dim() != 2 or ids.is_floating_point():
        raise DataError(
            f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be (batch, tokens) of "
            "whole numbers"
        )
    rows: list[list[int]] = ids.tolist()
    if mask is None:
        return rows
    if mask.shape != ids.shape:
        raise DataError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; they must be equal"
        )
    return [list(compress(row, kept)) for row, kept in zip(rows, mask.tolist(), strict=True)]


def _encode(texts: Sequence[str], tokenizer: Tokenizer | None, add_bos: bool) -> list[list[int]]:
    if tokenizer is None:
        raise ConfigError(
            "the prompts are text, but the model has no tokenizer: give tokenizer=, or token ids"
        )
    start = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    return [start + ids for ids in tokenizer.encode_batch(texts)]


def with_prompts(ids: Tensor, written: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Prompts as they came (B, T), what each row wrote after them, pads: (rows, T + the most written)."""
    most = max(map(len, written), default=0)
    tails = [[*row, *[pad] * (most - len(row))] for row in written]
    samples = len(written) // max(1, ids.shape[0])
    end = torch.tensor(tails, dtype=ids.dtype, device=ids.device).reshape(len(written), most)
    return torch.cat([ids.repeat_interleave(samples, 0), end], 1)
