"""Masked language modelling: which tokens of a row are hidden, and what is shown instead (BERT, arXiv
1810.04805).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from plait.config.errors import DataError
from plait.data.batch import IGNORED
from plait.data.packing import Rows, Sample
from plait.data.permutation import key_of, uniform
from plait.tokenizers.base import Tokenizer

_MASK = 3
_SHOW_MASK, _SHOW_RANDOM = 0.8, 0.9


class MaskedRows:
    """Rows with labels: a token is chosen with `probability`; then it shows as mask (80 %), random (10 %),
    itself (10 %).

    Special tokens are never chosen and never shown as random ones. Labels are the chosen tokens, -100
    elsewhere. All of it is a pure function of (seed, epoch, i), as the rows are.
    """

    def __init__(self, rows: Rows, tokenizer: Tokenizer, probability: float = 0.15) -> None:
        """DataError if the tokenizer has no mask token, or the probability is not in (0, 1]."""
        if tokenizer.mask_id is None:
            raise DataError(
                f"the {tokenizer.type} tokenizer has no mask token; name one in "
                "tokenizer.special_tokens (<|mask|>)"
            )
        if not 0 < probability <= 1:
            raise DataError(f"training.mlm_probability: {probability} is not in (0, 1]")
        self.rows = rows
        self.count = rows.count
        self._mask_id = tokenizer.mask_id
        self._probability = probability
        special = np.array(sorted(tokenizer.special_ids), dtype=np.int64)
        self._is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_special[special] = True
        self._ordinary = np.flatnonzero(~self._is_special)

    def sample(self, index: int) -> Sample:
        """Row of a global sample index, masked."""
        return self.mask(self.rows.sample(index), *divmod(index, self.count))

    def mask(self, sample: Sample, epoch: int, place: int) -> Sample:
        """A row masked as (seed, epoch, place) say."""
        tokens = sample.tokens
        chance, show, which = uniform(key_of(self.rows.seed, epoch, place, _MASK), 3 * tokens.size).reshape(
            3, -1
        )
        chosen = (chance < self._probability) & ~self._is_special[tokens]
        shown = np.where(chosen & (show < _SHOW_MASK), self._mask_id, tokens)
        random = self._ordinary[(which * self._ordinary.size).astype(np.int64)]
        shown = np.where(chosen & (show >= _SHOW_MASK) & (show < _SHOW_RANDOM), random, shown)
        return replace(sample, tokens=shown, labels=np.where(chosen, tokens, IGNORED))
