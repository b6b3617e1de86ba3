"""How a token's name in a `tokenizer.json` spells the bytes it stands for.

Four spellings cover what is in use: the byte alphabet (GPT-2, Llama 3, Qwen), spaces written as U+2581 with
or without single bytes as <0xNN> (SentencePiece, T5, Llama 2, Gemma), and WordPiece's prefix of continued
words (BERT).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from plait.config.errors import TokenizerError

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte: itself where it is one, else the next from U+0100
    on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_ALPHABET = byte_alphabet()
_BYTE_OF = {character: byte for byte, character in enumerate(_ALPHABET)}


@dataclass(frozen=True)
class Spelling:
    """Reads token names; `strip`: a text does not begin with the space that parts its words."""

    kind: Literal["alphabet", "spaces", "words"]
    strip: bool = False
    byte_fallback: bool = False
    prefix: str = "##"
    cleanup: bool = False

    def read(self, token: str) -> bytes:
        """The bytes of a token; a WordPiece token that begins a word has a space before it."""
        if self.kind == "alphabet":
            # A character outside the alphabet stands for itself, as in the library's decoder.
            return b"".join(bytes((_BYTE_OF[c],)) if c in _BYTE_OF else c.encode() for c in token)
        if self.kind == "words":
            if token.startswith(self.prefix):
                return token[len(self.prefix) :].encode()
            return token.encode() if self.cleanup and token in (".", ",", "?", "!") else b" " + token.encode()
        match = _BYTE_NAME.fullmatch(token) if self.byte_fallback else None
        return bytes((int(match[1], 16),)) if match else token.replace(SPACE_MARK, " ").encode()

    def byte_name(self, byte: int) -> str | None:
        """The name of the token that is this one byte, where such tokens exist."""
        if self.kind == "alphabet":
            return _ALPHABET[byte]
        return f"<0x{byte:02X}>" if self.byte_fallback else None

    def own_bytes(self, piece: bytes) -> int:
        """How many bytes of the text a piece stands for; WordPiece drops the spaces, so no token stands for
        them.
        """
        return len(piece.removeprefix(b" ") if self.kind == "words" else piece)


def read_spelling(data: dict[str, Any]) -> Spelling:
    """The spelling of a parsed tokenizer.json; TokenizerError if its decoder is none of the known ones."""
    model, decoders = data["model"], _flat(data.get("decoder"), "decoders")
    kinds = {entry["type"] for entry in decoders}
    pre_tokenizers = {entry["type"] for entry in _flat(data.get("pre_tokenizer"), "pretokenizers")}
    if kinds == {"ByteLevel"} or (not kinds and "ByteLevel" in pre_tokenizers):
        return Spelling("alphabet")
    if kinds == {"WordPiece"} or (not kinds and model["type"] == "WordPiece"):
        decoder = (
            decoders[0] if decoders else {"prefix": model["continuing_subword_prefix"], "cleanup": False}
        )
        return Spelling("words", strip=True, prefix=decoder["prefix"], cleanup=decoder["cleanup"])
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in kinds
    if "Metaspace" in kinds and kinds <= {"Metaspace", "ByteFallback", "Fuse"}:
        metaspace = next(entry for entry in decoders if entry["type"] == "Metaspace")
        if metaspace["replacement"] == SPACE_MARK:
            strip = metaspace.get("prepend_scheme", "always") != "never"
            return Spelling("spaces", strip=strip, byte_fallback=fallback)
    if "Replace" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replaced = [entry["pattern"].get("String") for entry in decoders if entry["type"] == "Replace"]
        if replaced == [SPACE_MARK]:
            return Spelling("spaces", strip="Strip" in kinds, byte_fallback=fallback)
    raise TokenizerError(
        f"the decoder of tokenizer.json ({', '.join(sorted(kinds)) or 'none'}) cannot be read byte by byte; "
        "known: ByteLevel, WordPiece, Metaspace, Replace with ByteFallback, Fuse and Strip"
    )


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A decoder or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return (
        [step for one in part[inner] for step in _flat(one, inner)] if part["type"] == "Sequence" else [part]
    )
