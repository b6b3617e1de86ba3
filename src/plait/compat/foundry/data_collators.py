"""Examples of different lengths to padded batches, for causal and for masked language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.config.errors import ConfigError, DataError
from plait.data.batch import IGNORED
from plait.data.masking import hide
from plait.tokenizers.base import Tokenizer

Examples = Sequence[Mapping[str, Any]]
_ROLES = ("bos", "eos", "pad", "cls", "sep", "unk", "mask")


@dataclass
class CausalLMDataCollator:
    """Examples ``{"input_ids": ids}`` to input_ids, attention_mask and labels, all (B, T) int64.

    Padded on the right, to a multiple of ``pad_to_multiple_of``. Labels are the ids themselves, -100 at pads; whoever
    predicts the next token shifts them. The tokenizer is one of Plait's, or has Hugging Face's ``pad_token_id``.
    """

    tokenizer: Any
    mlm: bool = False
    pad_to_multiple_of: int | None = 8

    def __call__(self, examples: Examples) -> dict[str, Tensor]:
        """One batch of these examples."""
        batch = _padded(examples, self.tokenizer, self.pad_to_multiple_of)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


@dataclass
class MaskedLMDataCollator:
    """As CausalLMDataCollator, with tokens hidden: 80 % of the chosen show as mask, 10 % as another token.

    Each token is chosen with ``mlm_probability``, special tokens and pads never. Labels are the chosen ids, -100
    elsewhere. torch's random numbers decide.
    """

    tokenizer: Any
    mlm: bool = True
    mlm_probability: float = 0.15
    pad_to_multiple_of: int | None = 8

    def __call__(self, examples: Examples) -> dict[str, Tensor]:
        """One batch of these examples."""
        batch = _padded(examples, self.tokenizer, self.pad_to_multiple_of)
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORED)
        if self.mlm:
            mask_id = _token_id(self.tokenizer, "mask")
            if mask_id is None:
                raise DataError("the tokenizer has no mask token, which a masked language model needs")
            tokens = ids[real].numpy()
            draws = torch.rand(3, tokens.size, dtype=torch.float64).numpy()
            special = _is_special(self.tokenizer)
            shown, wanted = hide(tokens, draws, self.mlm_probability, mask_id, special)
            ids[real], labels[real] = torch.from_numpy(shown), torch.from_numpy(wanted)
        else:
            labels[real] = ids[real]
        return {**batch, "labels": labels}


def get_data_collator(config: Any, tokenizer: Any) -> CausalLMDataCollator | MaskedLMDataCollator:
    """The collator of an ExperimentConfig's objective."""
    objective = config.training.objective
    if objective == "causal_lm":
        return CausalLMDataCollator(tokenizer)
    if objective == "masked_lm":
        return MaskedLMDataCollator(tokenizer, mlm_probability=config.training.mlm_probability)
    raise ConfigError(f"expected causal_lm or masked_lm; got {objective!r}", ("training", "objective"))


def _padded(examples: Examples, tokenizer: Any, multiple: int | None) -> dict[str, Tensor]:
    rows = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
    longest = max((len(row) for row in rows), default=0)
    width = longest if multiple is None else -(-longest // multiple) * multiple
    pad = _token_id(tokenizer, "pad")
    if pad is None:  # what stands at a pad is neither seen nor predicted
        pad = _token_id(tokenizer, "eos") or 0
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def _token_id(tokenizer: Any, role: str) -> int | None:
    """The id of a special token, of a tokenizer of Plait's or of Hugging Face's."""
    name = f"{role}_id" if isinstance(tokenizer, Tokenizer) else f"{role}_token_id"
    found: int | None = getattr(tokenizer, name, None)
    return found


def _is_special(tokenizer: Any) -> np.ndarray:
    """(V,): which ids are special tokens."""
    if isinstance(tokenizer, Tokenizer):
        size, special = tokenizer.vocab_size, set(tokenizer.special_ids)
    else:
        size = len(tokenizer)
        special = {found for role in _ROLES if (found := _token_id(tokenizer, role)) is not None}
    flags = np.zeros(size, dtype=np.bool_)
    flags[sorted(special)] = True
    return flags
