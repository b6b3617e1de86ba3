"""BPE, WordPiece and unigram through the `tokenizers` library, from and to its `tokenizer.json`.

What Plait trains as BPE and unigram works on the byte alphabet (each byte shown as one printable character,
as in GPT-2), so every text survives, also one that is not valid UTF-8. Files made elsewhere load too: their
decoder tells how a token's name is to be read (`Spelling`); one that cannot be read exactly is refused.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from plait.config.errors import TokenizerError
from plait.tokenizers.base import (
    HUGGINGFACE_FILE,
    REPLACEMENT,
    Tokenizer,
    checked_special_tokens,
    find_roles,
    to_text,
    token_dtype,
)
from plait.tokenizers.spelling import Spelling, read_spelling

TYPES = {"BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram"}
ROLES_FILE = "tokenizer_config.json"
# Role -> the keys of tokenizer_config.json that may name its token, in order of preference.
ROLE_KEYS: dict[str, tuple[str, ...]] = {
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "pad": ("pad_token",),
    "mask": ("mask_token",),
    "unk": ("unk_token",),
}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` with exact bytes for every token; special tokens in a text are read as plain
    text.
    """

    def __init__(self, source: str, roles: Mapping[str, str] | None = None) -> None:
        """source: the text of a tokenizer.json; roles: bos, eos, pad, mask, unk -> token name."""
        try:
            data = json.loads(source)
            engine = Engine.from_str(source)
            kind = data["model"]["type"]
        except Exception as error:  # the library raises bare Exception for what it cannot read
            raise TokenizerError(f"not a readable tokenizer.json: {str(error).splitlines()[0]}") from error
        if kind not in TYPES:
            raise TokenizerError(f"tokenizer.json holds a {kind} model; known: {', '.join(TYPES)}")
        self.type = TYPES[kind]  # type: ignore[misc]  # one class serves the three kinds
        # Text is only text: "<|eos|>" typed by somebody must not end a document.
        engine.encode_special_tokens = True
        engine.no_padding()
        engine.no_truncation()
        self._engine = engine
        self._source = source
        self._data = {key: value for key, value in data.items() if key not in ("padding", "truncation")}
        added: list[dict[str, Any]] = data.get("added_tokens") or []
        special = {entry["content"]: entry["id"] for entry in added if entry["special"]}
        vocabulary = engine.get_vocab(with_added_tokens=True)
        super().__init__(
            max(vocabulary.values()) + 1, special, find_roles(special) if roles is None else roles
        )
        self.spelling: Spelling = read_spelling(data)
        literal = {entry["id"] for entry in added}
        self._pieces = [b""] * self.vocab_size
        for token, number in vocabulary.items():
            if number not in self.special_ids:
                self._pieces[number] = token.encode() if number in literal else self.spelling.read(token)
        if self.unk_id is not None:
            self._pieces[self.unk_id] = REPLACEMENT.encode()
        names = [self.spelling.byte_name(byte) for byte in range(256)]
        self._byte_ids = [vocabulary[name] for name in names if name is not None and name in vocabulary]

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the text; bytes that are not UTF-8 are exact where the vocabulary has the bytes."""
        if isinstance(text, str):
            return list(self._engine.encode(to_text(text), add_special_tokens=False).ids)
        if len(self._byte_ids) < 256:
            return self.encode(to_text(text))
        ids: list[int] = []
        rest = memoryview(text)
        while rest:
            try:
                return ids + self.encode(codecs.utf_8_decode(rest, "strict", True)[0])
            except UnicodeDecodeError as error:
                if error.start:
                    ids += self.encode(codecs.utf_8_decode(rest[: error.start], "strict", True)[0])
                ids += [self._byte_ids[byte] for byte in rest[error.start : error.end]]
                rest = rest[error.end :]
        return ids

    def encode_batch(self, texts: Iterable[str | bytes]) -> list[list[int]]:
        """Ids of each text, encoded side by side; one that is not valid UTF-8 goes by itself."""
        batch = list(texts)
        strings: list[str | None] = [_as_string(text) for text in batch]
        good = [text for text in strings if text is not None]
        encoded = iter(self._engine.encode_batch_fast(good, add_special_tokens=False))
        return [
            self.encode(text) if string is None else list(next(encoded).ids)
            for text, string in zip(batch, strings, strict=True)
        ]

    def encode_arrays(self, texts: Iterable[str | bytes]) -> list[npt.NDArray[np.unsignedinteger]]:
        """As encode_batch, as arrays."""
        return [np.asarray(ids, dtype=token_dtype(self.vocab_size)) for ids in self.encode_batch(texts)]

    def with_special_tokens(self, names: Sequence[str]) -> HuggingFaceTokenizer:
        """The same tokenizer with more special tokens after its last id; TokenizerError for a name that it has."""
        engine = Engine.from_str(self._source)
        for name in checked_special_tokens(names):
            if engine.token_to_id(name) is not None:
                raise TokenizerError(f"{name} is a token of this tokenizer already, and not a special one")
        engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        made = HuggingFaceTokenizer(engine.to_str())
        for place, name in enumerate(
            names
        ):  # the library gives the ids; a file with gaps in them may surprise it
            if made.special_tokens[name] != self.vocab_size + place:
                raise TokenizerError(f"{name} cannot be added: the ids of this tokenizer.json have gaps")
        return HuggingFaceTokenizer(engine.to_str(), {**find_roles(names), **self.roles})

    def piece(self, token_id: int, first: bool = False) -> bytes:
        """The bytes the token adds to the text: with the space that goes before a word, where there is
        one.
        """
        piece = self._pieces[token_id]
        return piece.removeprefix(b" ") if first and self.spelling.strip else piece

    def token_bytes(self, token_id: int) -> int:
        """The bytes of text a token stands for; WordPiece loses the spaces, which no token stands for."""
        number = self.check(token_id)
        return 0 if number in self.special_ids else self.spelling.own_bytes(self._pieces[number])

    def description(self) -> dict[str, Any]:
        """The tokenizer.json without padding and truncation, and the roles."""
        return {"tokenizer": self._data, "roles": self.roles}

    def files(self) -> dict[str, bytes]:
        """tokenizer_config.json with the roles as Hugging Face names them, then tokenizer.json."""
        names = {ROLE_KEYS[role][0]: name for role, name in self.roles.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        return {ROLES_FILE: json.dumps(config, indent=1).encode(), HUGGINGFACE_FILE: self._source.encode()}


def _as_string(text: str | bytes) -> str | None:
    """The text as a valid string, or None for bytes that are not UTF-8."""
    if isinstance(text, str):
        return to_text(text)
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def read_roles(folder: Path, special_tokens: Iterable[str]) -> dict[str, str]:
    """Roles as a folder's tokenizer_config.json gives them, completed by the well-known names."""
    path = folder / ROLES_FILE
    known = set(special_tokens)
    roles = find_roles(known)
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        for role, keys in ROLE_KEYS.items():
            for key in reversed(keys):
                value = config.get(key)
                name = value.get("content") if isinstance(value, dict) else value
                if name in known:
                    roles[role] = name
    return roles


def load_huggingface(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json, with the roles of the tokenizer_config.json beside it."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    try:
        plain = HuggingFaceTokenizer(source)
        return HuggingFaceTokenizer(source, read_roles(path.parent, plain.special_tokens))
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
