"""The character tokenizer: one id a character of the training text, and one for every other character."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.config.errors import TokenizerError
from plait.tokenizers.base import (
    DEFAULT_SPECIAL_TOKENS,
    REPLACEMENT,
    Tokenizer,
    checked_special_tokens,
    own_file,
    to_text,
    token_dtype,
)

SPECIAL_TOKENS = ("<|unk|>", *DEFAULT_SPECIAL_TOKENS)


class CharactersTokenizer(Tokenizer):
    """Special tokens first, then the characters in the order given; a character not among them becomes
    unk.
    """

    type = "characters"

    def __init__(
        self, characters: str, special_tokens: Sequence[str] = SPECIAL_TOKENS, *, lowercase: bool = False
    ) -> None:
        """characters: the vocabulary; special_tokens must name an unknown token, such as <|unk|>."""
        names = checked_special_tokens(special_tokens)
        if len(set(characters)) != len(characters):
            raise TokenizerError("tokenizer: the vocabulary holds a character twice")
        super().__init__(len(names) + len(characters), {name: i for i, name in enumerate(names)})
        if self.unk_id is None:
            raise TokenizerError(
                f"tokenizer.special_tokens: characters need an unknown token <|unk|>, got {names}"
            )
        self.characters = characters
        self.lowercase = lowercase
        codes = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
        # Indexed by code point; the last entry serves all code points above the vocabulary's.
        self._ids = np.full(int(codes.max(initial=0)) + 2, self.unk_id, dtype=token_dtype(self.vocab_size))
        self._ids[codes] = np.arange(len(names), self.vocab_size)

    @classmethod
    def train(
        cls,
        texts: Iterable[str | bytes],
        vocab_size: int | None = None,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        *,
        lowercase: bool = False,
    ) -> CharactersTokenizer:
        """Collect the characters of the texts: all, or the most frequent that fit beside the special
        tokens.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(to_text(text).lower() if lowercase else to_text(text))
        room = None if vocab_size is None else vocab_size - len(checked_special_tokens(special_tokens))
        if room is not None and room < 1:
            raise TokenizerError(
                f"tokenizer.vocab_size: {vocab_size} leaves no room beside the special tokens"
            )
        kept = sorted(counts, key=lambda character: (-counts[character], character))[:room]
        if not kept:
            raise TokenizerError("the tokenizer cannot be trained: the texts are empty")
        return cls("".join(sorted(kept)), special_tokens, lowercase=lowercase)

    def encode(self, text: str | bytes) -> list[int]:
        """One id a character."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str | bytes) -> npt.NDArray[np.unsignedinteger]:
        """As encode, by one table look-up."""
        clean = to_text(text).lower() if self.lowercase else to_text(text)
        codes = np.frombuffer(clean.encode("utf-32-le"), dtype=np.uint32)
        return self._ids[np.minimum(codes, len(self._ids) - 1)]

    def piece(self, token_id: int, first: bool = False) -> bytes:
        """The character in UTF-8; U+FFFD for unk, nothing for the other special tokens."""
        if token_id == self.unk_id:
            return REPLACEMENT.encode()
        index = token_id - len(self.special_tokens)
        return self.characters[index].encode() if index >= 0 else b""

    def description(self) -> dict[str, Any]:
        """Characters, special tokens, case folding."""
        return {
            "characters": self.characters,
            "special_tokens": list(self.special_tokens),
            "lowercase": self.lowercase,
        }

    def files(self) -> dict[str, bytes]:
        """plait_tokenizer.json."""
        return own_file(self)
