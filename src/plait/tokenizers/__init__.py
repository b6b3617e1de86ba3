"""Text to token ids and back: bytes, BPE, WordPiece, unigram, characters, SentencePiece."""

from plait.tokenizers.base import StreamDecoder, Tokenizer
from plait.tokenizers.load import load_tokenizer, train_tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer", "train_tokenizer"]
