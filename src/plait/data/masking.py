"""Masked language modelling: which tokens of a row are hidden, and what is shown instead (BERT, arXiv
1810.04805).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from plait.config.errors import DataError
from plait.data.batch import IGNORED
from plait.data.packing import Ids, Rows, Sample
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

    def sample(self, index: int) -> Sample:
        """Row of a global sample index, masked."""
        return self.mask(self.rows.sample(index), *divmod(index, self.count))

    def mask(self, sample: Sample, epoch: int, place: int) -> Sample:
        """A row masked as (seed, epoch, place) say."""
        draws = uniform(key_of(self.rows.seed, epoch, place, _MASK), 3 * sample.tokens.size).reshape(3, -1)
        shown, labels = hide(sample.tokens, draws, self._probability, self._mask_id, self._is_special)
        return replace(sample, tokens=shown, labels=labels)


def hide(
    tokens: Ids,
    draws: npt.NDArray[np.float64],
    probability: float,
    mask_id: int,
    is_special: npt.NDArray[np.bool_],
) -> tuple[Ids, Ids]:
    """What is shown for tokens (T,), and their labels (T,), by draws (3, T) from [0, 1); is_special: (V,)."""
    chance, show, which = draws
    chosen = (chance < probability) & ~is_special[tokens]
    shown = np.where(chosen & (show < _SHOW_MASK), mask_id, tokens)
    ordinary = np.flatnonzero(~is_special)
    random = ordinary[(which * ordinary.size).astype(np.int64)]
    shown = np.where(chosen & (show >= _SHOW_MASK) & (show < _SHOW_RANDOM), random, shown)
    return shown, np.where(chosen, tokens, IGNORED)
