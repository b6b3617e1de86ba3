"""How surprising a text is, token by token and over exact regions of it.

The surprisal of a token is -log2 of its probability after all that stands before it (Hale 2001). A region is given
by its characters; its surprisal is the sum over every token that has a byte in it, so a region that begins or ends
inside a token takes the whole token and says so. Nothing is averaged away and no special token is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from plait.config.errors import ConfigError, DataError
from plait.evaluation.losses import token_losses
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer, to_text


@dataclass(frozen=True)
class TokenSurprisal:
    """One token of a text: the characters it covers, ``begin`` to ``end`` - 1, and what it cost."""

    token_id: int
    begin: int
    end: int
    bits: float


@dataclass(frozen=True)
class RegionSurprisal:
    """The tokens that cover a region, and their cost."""

    begin: int
    end: int
    bits: float
    n_tokens: int
    exact: bool  # whether the tokens cover the region's characters and, but for spaces, no others

    @property
    def mean(self) -> float:
        """Bits a token; NaN for a region without characters."""
        return self.bits / self.n_tokens if self.n_tokens else math.nan


@dataclass(frozen=True)
class Surprisal:
    """A text with the surprisal of all its tokens."""

    text: str
    tokens: tuple[TokenSurprisal, ...]

    @property
    def bits(self) -> float:
        """Of the whole text: -log2 of its probability."""
        return math.fsum(token.bits for token in self.tokens)

    def region(self, begin: int, end: int) -> RegionSurprisal:
        """Of characters ``begin`` to ``end`` - 1; DataError if the text has no such characters."""
        if not 0 <= begin <= end <= len(self.text):
            raise DataError(
                f"the region {begin}:{end} is not in the text, which has characters 0 to {len(self.text)}"
            )
        covering = [t for t in self.tokens if t.begin < end and t.end > begin]
        bits = math.fsum(t.bits for t in covering)
        first, last = (covering[0].begin, covering[-1].end) if covering else (begin, end)
        exact = not (self.text[first:begin] + self.text[end:last]).strip()
        return RegionSurprisal(begin, end, bits, len(covering), exact)

    def of(self, words: str, occurrence: int = 0) -> RegionSurprisal:
        """Of the given words where they stand in the text (the first time: occurrence 0); DataError if not there."""
        at = -1
        for _ in range(occurrence + 1):
            at = self.text.find(words, at + 1)
            if at < 0:
                raise DataError(f"{words!r} does not stand {occurrence + 1} times in {self.text!r}")
        return self.region(at, at + len(words))

    def hotspots(self, count: int = 5) -> list[TokenSurprisal]:
        """The most surprising tokens, the most first; of equals the earlier."""
        return sorted(self.tokens, key=lambda token: -token.bits)[:count]


def surprisals(
    model: Model,
    texts: Iterable[str],
    *,
    contexts: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    max_context: int | None = None,
) -> list[Surprisal]:
    """Of every token of each text, each alone after the tokenizer's begin token.

    contexts: as many texts that stand before them; they cost nothing and are in no result. A token that covers
    the end of the context and the beginning of the text belongs to the text.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("surprisals need a tokenizer, and the model has none: give tokenizer=")
    wanted = [to_text(text) for text in texts]
    before = [""] * len(wanted) if contexts is None else [to_text(text) for text in contexts]
    if len(before) != len(wanted):
        raise ConfigError(f"{len(before)} contexts were given for {len(wanted)} texts; they must be as many")
    ids = [tokenizer.encode(a + b) for a, b in zip(before, wanted, strict=True)]
    losses = token_losses(model, ids, start=tokenizer.bos_id, max_context=max_context)
    results = []
    for context, text, tokens, nats in zip(before, wanted, ids, losses, strict=True):
        places = spans(tokenizer, context + text, tokens)
        size = len(context)
        kept = tuple(
            TokenSurprisal(token, max(0, begin - size), end - size, float(cost) / math.log(2))
            for token, (begin, end), cost in zip(tokens, places, nats.double(), strict=True)
            if end > size
        )
        results.append(Surprisal(text, kept))
    return results


def spans(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """The characters that each token of ``text`` covers, from its bytes: of a split character, all its tokens.

    DataError if the tokenizer does not give the text back (it normalises, or knows not all of it).
    """
    pieces = [tokenizer.piece(token, index == 0) for index, token in enumerate(ids)]
    data, joined = text.encode(), b"".join(pieces)
    begin = 0
    if joined != data:  # the space that some tokenizers put before a text
        if joined.removeprefix(b" ") != data:
            raise DataError(
                f"this tokenizer ({tokenizer.type}) gives {text!r} back as {joined.decode(errors='replace')!r}, so "
                "its tokens cannot be placed in the text"
            )
        begin = -1
    # the character that each byte belongs to, and one past the last
    owner = [index for index, character in enumerate(text) for _ in character.encode()] + [len(text)]
    ends = list(accumulate((len(piece) for piece in pieces), initial=begin))
    return [
        (owner[max(0, a)], owner[max(0, b - 1)] + 1 if b > max(a, 0) else owner[max(0, a)])
        for a, b in pairwise(ends)
    ]
