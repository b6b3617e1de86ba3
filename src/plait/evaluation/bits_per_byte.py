"""Bits per byte of a model over documents: the one number that compares models of any tokenizer, and gzip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from plait.config.errors import ConfigError
from plait.data.documents import Document
from plait.evaluation.losses import token_losses
from plait.evaluation.score import Score
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer


def bits_per_byte(
    model: Model,
    documents: Iterable[str | bytes | Document],
    *,
    tokenizer: Tokenizer | None = None,
    max_context: int | None = None,
    carry: bool | None = None,
    batch_tokens: int | None = None,
) -> Score:
    """The score of a model over documents: each token predicted once, from what its document holds before it.

    Each document begins after the tokenizer's bos; see ``token_losses`` for that and for the options. A token
    counts as the bytes of text that it stands for: special and unknown tokens cost, but count for nothing.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("bits per byte need a tokenizer, and the model has none: give tokenizer=")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model a vocabulary of {model.vocab_size}"
        )
    texts = list(joined(documents))
    ids = [tokenizer.encode_array(text) for text in texts]
    losses = token_losses(
        model,
        ids,
        start=tokenizer.bos_id,
        max_context=max_context,
        carry=carry,
        batch_tokens=batch_tokens,
    )
    lengths = tokenizer.token_bytes_table()
    # a tokenizer that marks the beginning of a text by a space of its own gives that space no byte
    n_bytes = sum(min(int(lengths[i].sum()), _size(text)) for i, text in zip(ids, texts, strict=True))
    return Score(sum(float(x.double().sum()) for x in losses), sum(map(len, ids)), n_bytes)


def joined(documents: Iterable[str | bytes | Document]) -> Iterator[bytes | str]:
    """The texts of documents; those that come in several pieces, in one."""
    held: list[bytes] = []
    for document in documents:
        text = document.text if isinstance(document, Document) else document
        if held and not (isinstance(document, Document) and document.continues):
            yield b"".join(held)
            held = []
        held.append(text.encode() if isinstance(text, str) else text)
    if held:
        yield b"".join(held)


def _size(text: str | bytes) -> int:
    return len(text if isinstance(text, bytes) else text.encode())
