"""What every tokenizer is: ids, special tokens and their roles, exact bytes of each token, a streaming
decoder.

A tokenizer is built on one idea: each id stands for a *piece*, the bytes it adds to the text. Decoding
joins pieces, counting bytes measures them, streaming feeds them to an incremental UTF-8 decoder; so the
three cannot disagree. Text passes `to_text` first, which repairs lone surrogates (JSON allows them, UTF-8
does not).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from plait.config.errors import TokenizerError
from plait.tokenizers.files import write_file

# What a saved tokenizer is recognised by, in the order in which load_tokenizer looks.
MAIN_FILES = OWN_FILE, HUGGINGFACE_FILE, SENTENCEPIECE_FILE = (
    "plait_tokenizer.json",
    "tokenizer.json",
    "tokenizer.model",
)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
DEFAULT_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>")

# Special tokens are recognised by name when nothing says which is which; the first one present wins.
ROLE_NAMES: dict[str, tuple[str, ...]] = {
    "bos": (
        "<|bos|>",
        "<bos>",
        "<s>",
        "[BOS]",
        "<|begin_of_text|>",
        "<|startoftext|>",
        "[CLS]",
        "<|endoftext|>",
    ),
    "eos": ("<|eos|>", "<eos>", "</s>", "[EOS]", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "mask": ("<|mask|>", "<mask>", "[MASK]"),
    "unk": ("<|unk|>", "<unk>", "[UNK]"),
}


def to_text(text: str | bytes) -> str:
    """Text as valid Unicode: bytes that are not UTF-8 and lone surrogates become U+FFFD."""
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def to_bytes(text: str | bytes) -> bytes:
    """Text as the bytes that are counted: bytes as they are, a string as UTF-8."""
    return text if isinstance(text, bytes) else to_text(text).encode()


def token_dtype(vocab_size: int) -> npt.DTypeLike:
    """The narrowest of uint16 and uint32 that holds every id below vocab_size."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def own_file(tokenizer: Tokenizer) -> dict[str, bytes]:
    """plait_tokenizer.json for a tokenizer that is nothing but its type and its description."""
    text = json.dumps({"type": tokenizer.type, **tokenizer.description()}, indent=1, ensure_ascii=True)
    return {OWN_FILE: text.encode()}


def find_roles(special_tokens: Iterable[str]) -> dict[str, str]:
    """Which special token plays which role (bos, eos, pad, mask, unk), by its name."""
    present = set(special_tokens)
    found = {
        role: next((name for name in names if name in present), None) for role, names in ROLE_NAMES.items()
    }
    return {role: name for role, name in found.items() if name is not None}


def checked_special_tokens(names: Sequence[str]) -> list[str]:
    """The names as a list; TokenizerError for an empty or repeated one."""
    chosen = list(names)
    if "" in chosen or len(set(chosen)) != len(chosen):
        raise TokenizerError(f"tokenizer.special_tokens: names must be different and not empty, got {chosen}")
    return chosen


class Tokenizer(ABC):
    """Text to ids and back; ids are 0 .. vocab_size - 1, some of which are special and stand for no text."""

    type: ClassVar[str]

    def __init__(
        self, vocab_size: int, special_tokens: Mapping[str, int], roles: Mapping[str, str] | None = None
    ) -> None:
        """special_tokens: name -> id; roles: bos, eos, pad, mask, unk -> name (recognised by name if
        None).
        """
        self._fingerprint: str | None = None
        self.vocab_size = vocab_size
        self.special_tokens = dict(special_tokens)
        self.roles = dict(find_roles(special_tokens) if roles is None else roles)
        self.special_ids = frozenset(self.special_tokens.values())
        ids = {role: self.special_tokens[name] for role, name in self.roles.items()}
        self.bos_id, self.eos_id, self.pad_id = ids.get("bos"), ids.get("eos"), ids.get("pad")
        self.mask_id, self.unk_id = ids.get("mask"), ids.get("unk")

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text. No special token is added, and none is ever read out of the text."""

    @abstractmethod
    def piece(self, token_id: int, first: bool = False) -> bytes:
        """The bytes an id adds to the text; `first` when nothing stands before it. Empty for special
        tokens.
        """

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that load_tokenizer reads, name -> content; the last one is one of MAIN_FILES."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Everything the ids depend on, as JSON data."""

    def fingerprint(self) -> str:
        """sha256 of the description: equal fingerprints give equal ids."""
        if self._fingerprint is None:
            text = json.dumps({"type": self.type, **self.description()}, sort_keys=True, ensure_ascii=True)
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprint

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder, so that load_tokenizer(folder) gives it back; each file whole
        or not.
        """
        files = self.files()
        try:
            for name, content in files.items():
                write_file(Path(folder) / name, content)
            # Another tokenizer's main file that was there before must not be found first.
            for name in MAIN_FILES[: MAIN_FILES.index(next(reversed(files)))]:
                (Path(folder) / name).unlink(missing_ok=True)
        except OSError as error:
            raise TokenizerError(
                f"cannot save the tokenizer to {folder}: {error.strerror or error}"
            ) from error

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """The same tokenizer with more special tokens after its last id; no id that it has changes.

        TokenizerError if its kind cannot take more once it is made.
        """
        raise TokenizerError(
            f"a {self.type} tokenizer takes no more special tokens ({', '.join(names)}) once it is made: train it "
            "with them, by tokenizer.special_tokens or tokenizer.chat"
        )

    def encode_array(self, text: str | bytes) -> npt.NDArray[np.unsignedinteger]:
        """As encode, as an array of the narrowest fitting unsigned type."""
        return np.asarray(self.encode(text), dtype=token_dtype(self.vocab_size))

    def encode_batch(self, texts: Iterable[str | bytes]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Iterable[str | bytes]) -> list[npt.NDArray[np.unsignedinteger]]:
        """As encode_batch, each as encode_array gives it."""
        return [self.encode_array(text) for text in texts]

    def check(self, token_id: int) -> int:
        """The id as an int; TokenizerError if it is not one of this vocabulary."""
        number = int(token_id)
        if not 0 <= number < self.vocab_size:
            raise TokenizerError(f"token id {number} is outside the vocabulary 0 .. {self.vocab_size - 1}")
        return number

    def is_silent(self, token_id: int) -> bool:
        """Whether an id adds nothing to the text: a special token other than unk, which shows as U+FFFD."""
        return token_id in self.special_ids and token_id != self.unk_id

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes the ids stand for; exact also where a character is split over tokens. Specials stand
        for none.
        """
        parts: list[bytes] = []
        first = True
        for token_id in ids:
            number = self.check(token_id)
            parts.append(self.piece(number, first))
            first = first and self.is_silent(number)
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text the ids stand for; what is not valid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> int:
        """How many bytes of text an id stands for: 0 for special tokens, the unknown token among them."""
        number = self.check(token_id)
        return 0 if number in self.special_ids else len(self.piece(number))

    def token_bytes_table(self) -> npt.NDArray[np.int32]:
        """token_bytes of every id, (vocab_size,)."""
        return np.array([self.token_bytes(i) for i in range(self.vocab_size)], dtype=np.int32)


class StreamDecoder:
    """Decodes one id at a time and never emits half a character: what is not yet complete is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True

    def push(self, token_id: int) -> str:
        """The text that is certain once this id is known; possibly empty."""
        number = self._tokenizer.check(token_id)
        piece = self._tokenizer.piece(number, self._first)
        self._first = self._first and self._tokenizer.is_silent(number)
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What was held back, as U+FFFD where it never became a character; the decoder is as new
        afterwards.
        """
        rest = self._utf8.decode(b"", final=True)
        self._first = True
        return rest
