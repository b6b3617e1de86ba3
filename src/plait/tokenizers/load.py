"""The two doors: load a tokenizer from a folder, a file or a config, and train one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from plait.config.data import TokenizerConfig
from plait.config.errors import TokenizerError, nearest
from plait.tokenizers import characters
from plait.tokenizers.base import DEFAULT_SPECIAL_TOKENS, MAIN_FILES, OWN_FILE, Tokenizer, find_roles
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.characters import CharactersTokenizer
from plait.tokenizers.chat import BOS, CHAT_TOKENS, with_chat_tokens

DEFAULT_VOCAB_SIZE = 8192
PICKLE_FILE = "tokenizer.pkl"  # nanochat's; see plait.tokenizers.nanochat
# BERT's own names, so that its vocabulary and one that Plait trains agree.
WORDPIECE_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(source: TokenizerConfig | str | Path) -> Tokenizer:
    """The tokenizer of a config, or of a folder or file that a tokenizer was saved to.

    Files: plait_tokenizer.json, tokenizer.json, tokenizer.model or any *.model (looked for in this order in
    a folder). TokenizerError if there is none, if it is broken, or if it is of another type than the config
    says.
    """
    if not isinstance(source, TokenizerConfig):
        return _load_path(Path(source))
    if source.path is not None:
        tokenizer = _load_path(Path(source.path))
        if tokenizer.type != source.type:
            raise TokenizerError(
                f"tokenizer.type is {source.type}, but {source.path} holds a {tokenizer.type} tokenizer"
            )
        return with_chat_tokens(tokenizer) if source.chat else tokenizer
    if source.type == "bytes":
        return _bytes(source)
    raise TokenizerError(
        f"tokenizer.path: a {source.type} tokenizer is trained first (plait tokenizer train), then named "
        "by its folder"
    )


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str | bytes]) -> Tokenizer:
    """Train the tokenizer a config describes on texts, read once; bytes needs none and reads none.

    config.special_tokens come after the usual ones of the type, and those of config.chat after them.
    """
    if config.split != "gpt2" and config.type not in ("bpe", "unigram"):
        raise TokenizerError(f"tokenizer.split is for bpe and unigram, not for {config.type}; leave it out")
    size = DEFAULT_VOCAB_SIZE if config.vocab_size is None else config.vocab_size
    if config.type == "bytes":
        return _bytes(config)
    if config.type == "characters":
        special = _special_tokens(config, characters.SPECIAL_TOKENS)
        return CharactersTokenizer.train(texts, config.vocab_size, special, lowercase=config.lowercase)
    if config.type == "sentencepiece":
        from plait.tokenizers import sentencepiece

        if config.lowercase:
            raise TokenizerError("tokenizer.lowercase is not for sentencepiece; train unigram instead")
        special = _special_tokens(config, sentencepiece.SPECIAL_TOKENS)
        return sentencepiece.SentencePieceTokenizer.train(texts, size, special)
    from plait.tokenizers.train import train_subwords

    usual = WORDPIECE_SPECIAL_TOKENS if config.type == "wordpiece" else DEFAULT_SPECIAL_TOKENS
    special = _special_tokens(config, usual)
    return train_subwords(config.type, texts, size, special, lowercase=config.lowercase, split=config.split)


def _special_tokens(config: TokenizerConfig, usual: Sequence[str]) -> list[str]:
    names = [*usual, *(name for name in config.special_tokens or () if name not in usual)]
    if config.chat:
        names += [name for name in CHAT_TOKENS if name not in names]
        names += [] if "bos" in find_roles(names) else [BOS]
    return names


def _bytes(config: TokenizerConfig) -> BytesTokenizer:
    if config.lowercase:
        raise TokenizerError("tokenizer.lowercase is not for bytes, which keep every text as it is")
    tokenizer = BytesTokenizer(_special_tokens(config, DEFAULT_SPECIAL_TOKENS))
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise TokenizerError(
            f"tokenizer.vocab_size: bytes and their special tokens are {tokenizer.vocab_size}, "
            f"got {config.vocab_size}; leave it out (model.pad_vocab_size_multiple rounds up)"
        )
    return tokenizer


def _load_path(path: Path) -> Tokenizer:
    if path.is_dir():
        for name in MAIN_FILES:
            if (path / name).is_file():
                return _load_path(path / name)
        if (path / PICKLE_FILE).is_file():
            raise TokenizerError(
                f"{path} holds a nanochat tokenizer, a pickle: make it one of ours with plait tokenizer import {path} "
                "--allow-pickle --out FOLDER"
            )
        raise TokenizerError(f"{path} holds no tokenizer; looked for {', '.join(MAIN_FILES)}")
    if not path.is_file():
        raise TokenizerError(f"there is no tokenizer at {path}")
    if path.suffix == ".model":
        from plait.tokenizers.sentencepiece import load_sentencepiece

        return load_sentencepiece(path)
    if path.name == OWN_FILE:
        return _load_own(path)
    from plait.tokenizers.huggingface import load_huggingface

    return load_huggingface(path)


def _load_own(path: Path) -> Tokenizer:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    kind = data.pop("type", None) if isinstance(data, dict) else None
    kinds: dict[str, type[BytesTokenizer] | type[CharactersTokenizer]] = {
        "bytes": BytesTokenizer,
        "characters": CharactersTokenizer,
    }
    if kind not in kinds:
        raise TokenizerError(
            f"{path}: type {kind!r} is none of {', '.join(kinds)}{nearest(str(kind), kinds)}"
        )
    try:
        return kinds[kind](**data)
    except (TypeError, AttributeError, ValueError) as error:
        raise TokenizerError(f"{path} is not a {kind} tokenizer: {error}") from error
