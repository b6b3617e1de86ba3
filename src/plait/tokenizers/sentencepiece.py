"""SentencePiece models, with the `sentencepiece` package (extra `hf`), which is imported when one is made."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plait.config.errors import TokenizerError
from plait.tokenizers.base import REPLACEMENT, SENTENCEPIECE_FILE, Tokenizer, checked_special_tokens, to_text
from plait.tokenizers.spelling import SPACE_MARK

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise TokenizerError(
            "SentencePiece models need the package sentencepiece: pip install 'plait[hf]'"
        ) from error
    return sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its control symbols are the special tokens."""

    type = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        """model: the content of a .model file."""
        library = _library()
        self._processor = library.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError("not a readable SentencePiece model") from error
        self._model = model
        processor = self._processor
        size = processor.get_piece_size()
        ids = {
            "bos": processor.bos_id(),
            "eos": processor.eos_id(),
            "pad": processor.pad_id(),
            "unk": processor.unk_id(),
        }
        roles = {role: processor.id_to_piece(number) for role, number in ids.items() if number >= 0}
        special = {
            processor.id_to_piece(i): i
            for i in range(size)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        mask = next((name for name in ("<mask>", "[MASK]", "<|mask|>") if name in special), None)
        super().__init__(size, special, roles if mask is None else {**roles, "mask": mask})
        self._pieces = [self._read(i) for i in range(size)]
        # The model's own switch is only visible through what it does.
        self._strip = processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)

    def _read(self, number: int) -> bytes:
        if number == self.unk_id:
            return REPLACEMENT.encode()
        if number in self.special_ids:
            return b""
        name: str = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes((int(name[3:5], 16),))
        return name.replace(SPACE_MARK, " ").encode()

    @classmethod
    def train(
        cls, texts: Iterable[str | bytes], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> SentencePieceTokenizer:
        """Train a unigram model with single bytes for unknown characters and spaces kept as they are."""
        names = checked_special_tokens(special_tokens)
        if names[:3] != list(SPECIAL_TOKENS[:3]):
            raise TokenizerError(
                f"tokenizer.special_tokens: sentencepiece begins with <unk>, <s>, </s>; got {names}"
            )
        library = _library()
        model = io.BytesIO()
        try:
            library.SentencePieceTrainer.train(
                sentence_iterator=(line for text in texts for line in to_text(text).splitlines()),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="unigram",
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                hard_vocab_limit=False,
                pad_id=3 if "<pad>" in names else -1,
                control_symbols=[name for name in names[3:] if name != "<pad>"],
                minloglevel=2,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(
                f"the SentencePiece model cannot be trained: {str(error).splitlines()[0]}"
            ) from error
        return cls(model.getvalue())

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the text; bytes that are not UTF-8 become U+FFFD first."""
        return list(self._processor.encode(to_text(text)))

    def piece(self, token_id: int, first: bool = False) -> bytes:
        """The bytes of the token, without the space the model itself puts before a text."""
        piece = self._pieces[token_id]
        return piece.removeprefix(b" ") if first and self._strip else piece

    def description(self) -> dict[str, Any]:
        """The sha256 of the model."""
        return {"model": hashlib.sha256(self._model).hexdigest()}

    def files(self) -> dict[str, bytes]:
        """tokenizer.model."""
        return {SENTENCEPIECE_FILE: self._model}


def load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece .model file."""
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
