"""Training of the subword tokenizers with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from plait.config.errors import PlaitError, TokenizerError
from plait.tokenizers.base import (
    ROLE_NAMES,
    checked_special_tokens,
    to_text,
)
from plait.tokenizers.huggingface import HuggingFaceTokenizer


def train_subwords(
    kind: str,
    texts: Iterable[str | bytes],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    lowercase: bool = False,
) -> HuggingFaceTokenizer:
    """Train bpe, wordpiece or unigram to at most vocab_size tokens, special tokens first and counted.

    BPE and unigram contain all 256 bytes; WordPiece needs an unknown token ([UNK]) among the special tokens.
    """
    size, special = vocab_size, checked_special_tokens(special_tokens)
    least = len(special) + (1 if kind == "wordpiece" else 256)
    if size < least:
        raise TokenizerError(f"tokenizer.vocab_size: {size} is too small for {kind}; at least {least}")
    if kind == "wordpiece":
        engine, trainer = _wordpiece(size, special, lowercase)
    else:
        engine, trainer = _on_bytes(kind, size, special, lowercase)
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            clean = to_text(text)
            seen += len(clean)
            yield clean

    try:
        engine.train_from_iterator(counted(), trainer)
    except PlaitError:  # of the texts, which are read while the library trains
        raise
    except Exception as error:  # the library raises bare Exception; our own errors pass through it unchanged
        if seen:
            raise
        raise TokenizerError("the tokenizer cannot be trained: the texts are empty") from error
    if not seen:
        raise TokenizerError("the tokenizer cannot be trained: the texts are empty")
    return HuggingFaceTokenizer(engine.to_str())


def _on_bytes(kind: str, size: int, special: list[str], lowercase: bool) -> tuple[Engine, trainers.Trainer]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: trainers.Trainer
    if kind == "bpe":
        engine = Engine(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        engine = Engine(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    if lowercase:
        engine.normalizer = normalizers.Lowercase()
    return engine, trainer


def _wordpiece(size: int, special: list[str], lowercase: bool) -> tuple[Engine, trainers.Trainer]:
    unknown = next((name for name in ROLE_NAMES["unk"] if name in special), None)
    if unknown is None:
        raise TokenizerError(
            f"tokenizer.special_tokens: wordpiece needs an unknown token [UNK], got {special}"
        )
    engine = Engine(models.WordPiece(unk_token=unknown))
    engine.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    return engine, trainer
