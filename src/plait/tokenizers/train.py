"""Training of the subword tokenizers with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from plait.config.errors import PlaitError, TokenizerError, nearest
from plait.tokenizers.base import (
    ROLE_NAMES,
    checked_special_tokens,
    to_text,
)
from plait.tokenizers.huggingface import HuggingFaceTokenizer


def gpt4_pattern(digits: int) -> str:
    """GPT-4's pattern of what is never merged across, numbers in groups of at most ``digits`` digits."""
    return (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,"
        + str(digits)
        + r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


# tokenizer.split -> the pattern by which text is cut before tokens are merged; GPT-2's is the library's own.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {"gpt2": GPT2_PATTERN, "gpt4": gpt4_pattern(3), "nanochat": gpt4_pattern(2)}


def train_subwords(
    kind: str,
    texts: Iterable[str | bytes],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    lowercase: bool = False,
    split: str = "gpt2",
) -> HuggingFaceTokenizer:
    """Train bpe, wordpiece or unigram to at most vocab_size tokens, special tokens first and counted.

    BPE and unigram contain all 256 bytes; WordPiece needs an unknown token ([UNK]) among the special tokens.
    split: of SPLITS, for bpe and unigram; with nanochat's the special tokens come last, as they do there.
    """
    if split not in SPLITS:
        raise TokenizerError(
            f"tokenizer.split: {split!r} is none of {', '.join(SPLITS)}{nearest(split, SPLITS)}"
        )
    if kind == "wordpiece" and split != "gpt2":
        raise TokenizerError("tokenizer.split is for bpe and unigram; wordpiece cuts text in its own way")
    size, special = vocab_size, checked_special_tokens(special_tokens)
    least = len(special) + (1 if kind == "wordpiece" else 256)
    if size < least:
        raise TokenizerError(f"tokenizer.vocab_size: {size} is too small for {kind}; at least {least}")
    last: list[str] = []
    if kind == "wordpiece":
        engine, trainer = _wordpiece(size, special, lowercase)
    else:
        last = special if split == "nanochat" else []
        first = [name for name in special if name not in last]
        engine, trainer = _on_bytes(kind, size - len(last), first, lowercase, split)
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
    if last:
        engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in last])
    return HuggingFaceTokenizer(engine.to_str())


def split_and_spell(split: str) -> pre_tokenizers.PreTokenizer:
    """Cuts text by a pattern (a name of SPLITS, or a pattern itself), then writes its bytes in the byte alphabet."""
    if split == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    pattern = Regex(SPLITS.get(split, split))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _on_bytes(
    kind: str, size: int, special: list[str], lowercase: bool, split: str
) -> tuple[Engine, trainers.Trainer]:
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
    engine.pre_tokenizer = split_and_spell(split)
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
