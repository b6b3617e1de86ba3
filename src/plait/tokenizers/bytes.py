"""The byte tokenizer: ids 0 .. 255 are the bytes themselves, special tokens follow. It needs no training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.tokenizers.base import (
    DEFAULT_SPECIAL_TOKENS,
    Tokenizer,
    checked_special_tokens,
    own_file,
    to_bytes,
    token_dtype,
)

N_BYTES = 256


class BytesTokenizer(Tokenizer):
    """Every text, also one that is not valid UTF-8, is its own bytes; by default 256 bos, 257 eos, 258 pad,
    259 mask.
    """

    type = "bytes"

    def __init__(self, special_tokens: Sequence[str] = DEFAULT_SPECIAL_TOKENS) -> None:
        """special_tokens: their names, from id 256 on."""
        names = checked_special_tokens(special_tokens)
        super().__init__(N_BYTES + len(names), {name: N_BYTES + i for i, name in enumerate(names)})

    def with_special_tokens(self, names: Sequence[str]) -> BytesTokenizer:
        """The same tokenizer with more special tokens after its last id."""
        return BytesTokenizer([*self.special_tokens, *names])

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of the text (of its UTF-8 form) as ids."""
        return list(to_bytes(text))

    def encode_array(self, text: str | bytes) -> npt.NDArray[np.unsignedinteger]:
        """As encode, without a Python list in between."""
        return np.frombuffer(to_bytes(text), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def piece(self, token_id: int, first: bool = False) -> bytes:
        """The byte, or nothing for a special token."""
        return bytes((token_id,)) if token_id < N_BYTES else b""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The ids below 256 as bytes; special tokens are left out."""
        return bytes(number for number in map(self.check, ids) if number < N_BYTES)

    def description(self) -> dict[str, Any]:
        """The names of the special tokens, in the order of their ids."""
        return {"special_tokens": list(self.special_tokens)}

    def files(self) -> dict[str, bytes]:
        """plait_tokenizer.json."""
        return own_file(self)
