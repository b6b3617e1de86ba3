"""Conversations to be learnt from: lines of JSONL (or rows of Parquet), rendered once into token shards with a mask.

A line is {"messages": [...]} or the list of messages itself (nanochat's CustomJSON); what a message is, the template
in plait.tokenizers.chat says. Beside a shard's other files lies ``mask.bin`` (uint8 a token): 1 what the model is to
learn, 0 what it only reads. Each conversation is one document. Rows hold as many whole ones as fit, so none sees
another, and none is cut but one that is longer than a row, which keeps its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.config.data import DataConfig
from plait.config.errors import DataError
from plait.config.machine import cache_folder
from plait.data.batch import IGNORED
from plait.data.documents import json_lines, parquet_rows
from plait.data.packing import Sample
from plait.data.permutation import Permutation, key_of
from plait.data.prepare import both_sides, new_shard, shard_key, shown
from plait.data.shards import TokenShards
from plait.data.sources import Source, Split, by_last_file, held_out, resolve_sources
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.chat import ChatTemplate, checked_messages

MASK = "mask.bin"
_FORM = "conversations 1"  # part of a shard's name: another rendering is another shard
_ORDER, _FILL = 1, 4


class Conversations(TokenShards):
    """A shard of conversations with its mask (n_tokens,), uint8."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """As TokenShards; DataError too if the mask is missing or truncated."""
        super().__init__(folder, tokenizer)
        self._check_size(self.folder / MASK, self.n_tokens)
        self.mask = self._map(MASK, np.dtype(np.uint8))

    def labels_of(self, start: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens that stand at ``start`` of the shard, -100 where they are not to be learnt."""
        return np.where(self.mask[start : start + len(tokens)] != 0, tokens, IGNORED)


def read_conversations(
    sources: Sequence[Source], *, split: Split = "all", fraction: float = 0.0
) -> Iterator[tuple[str, Any]]:
    """(file and line, conversation) of each one, or of those of a split, chosen by a hash of the file and line."""
    for source in sources:
        if source.format not in ("jsonl", "parquet"):
            raise DataError(
                f"{source.path}: conversations are lines of JSONL or rows of Parquet with a column messages; if it is "
                "JSONL by another name, set data.format: jsonl"
            )
        rows = (
            json_lines(source)
            if source.format == "jsonl"
            else ((number, {"messages": values[0]}) for number, values in parquet_rows(source, ["messages"]))
        )
        for number, conversation in rows:
            if split == "all" or held_out(f"{source.name}#{number}", fraction) == (split == "validation"):
                yield f"{source.path}:{number}", conversation


def prepare_conversations(
    spec: str | Sequence[str],
    tokenizer: Tokenizer,
    *,
    cache: str | Path | None = None,
    format: str = "auto",
    split: Split = "all",
    fraction: float = 0.0,
    validation_split: str = "documents",
    progress: Callable[[int], None] | None = None,
) -> Conversations:
    """The shard of all conversations in some files (or of a split of them), made if it is not there yet.

    TokenizerError if the tokenizer has no chat tokens; DataError names the file and line of what is no conversation,
    or of one in which the assistant says nothing. progress is called with the bytes of text done so far.
    """
    template = ChatTemplate(tokenizer)
    sources = resolve_sources(spec, format)
    if validation_split == "last_file" and split != "all":
        sources, split, fraction = by_last_file(sources, split), "all", 0.0
    folder = cache_folder(cache) / f"tokens-{shard_key(sources, tokenizer, _FORM, split, fraction)}"
    if folder.is_dir():
        return Conversations(folder, tokenizer)
    found = read_conversations(sources, split=split, fraction=fraction)
    first = next(found, None)
    if first is None:
        why = (
            f"data.validation_fraction {fraction:g} leaves no conversation for {split}"
            if fraction
            else "none is there"
        )
        raise DataError(f"data: no conversation in {shown(spec)}: {why}")
    lengths = tokenizer.token_bytes_table()
    with new_shard(folder, tokenizer) as (temporary, writer), (temporary / MASK).open("wb") as masks:
        for place, conversation in chain([first], found):
            try:
                ids, mask = template.render(conversation)
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
            if not any(mask):
                raise DataError(
                    f"{place}: the assistant says nothing in this conversation, so nothing can be learnt"
                )
            writer.add(ids, int(lengths[ids].sum()))
            masks.write(bytes(mask))
            if progress is not None:
                progress(writer.n_bytes)
        writer.close(sources=shown(spec), split=split)
    return Conversations(folder, tokenizer)


def open_conversations(
    config: DataConfig, tokenizer: Tokenizer, *, progress: Callable[[int], None] | None = None
) -> tuple[Conversations, Conversations | None]:
    """The training and the validation conversations that a config names, prepared if need be.

    Validation is None if neither data.validation nor data.validation_fraction asks for any.
    """

    def shard(spec: str | Sequence[str], split: Split, train: Conversations | None) -> Conversations:
        return prepare_conversations(
            spec,
            tokenizer,
            cache=config.cache,
            format=config.format,
            split=split,
            fraction=config.validation_fraction if split != "all" else 0.0,
            validation_split=config.validation_split,
            progress=progress,
        )

    return both_sides(config, shard)


def conversation_texts(config: DataConfig) -> Iterator[str]:
    """What is said in the training conversations, text by text: to train a tokenizer on."""
    if config.train is None:
        raise DataError(
            "data.train: no conversations are named; give a file, a folder, a glob or a list of them"
        )
    sources = resolve_sources(config.train, config.format)
    split: Split = "all"
    if config.validation is None and config.validation_split == "last_file":
        sources = by_last_file(sources, "train")
    elif config.validation is None and config.validation_fraction:
        split = "train"
    for place, conversation in read_conversations(sources, split=split, fraction=config.validation_fraction):
        try:
            messages = checked_messages(conversation)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        for message in messages:
            content = message["content"]
            yield from [content] if isinstance(content, str) else [part["text"] for part in content]


class ConversationRows:
    """Rows of whole conversations for training, in an order that is a pure function of (seed, epoch).

    Which conversations share a row is drawn once, by the seed: one after another as long as they fit. So an epoch has
    the same number of rows each time. A row has at most ``sequence_length`` tokens, and no pads.
    """

    def __init__(
        self, shards: Conversations, sequence_length: int, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        """A longer conversation keeps its beginning; one without anything to learn in it is left out.

        DataError if none is left.
        """
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        starts = shards.bounds[:-1].astype(np.int64)
        lengths = np.minimum(np.diff(shards.bounds).astype(np.int64), sequence_length)
        whole = np.diff(shards.bounds) <= sequence_length
        kept = [
            number
            for number in range(shards.n_documents)
            # The first token of a document is no target: nothing stands before it.
            if whole[number] or shards.mask[starts[number] + 1 : starts[number] + lengths[number]].any()
        ]
        if not kept:
            raise DataError(
                f"data.sequence_length: {sequence_length} cuts every conversation before the assistant speaks; raise it"
            )
        order = np.array(kept, dtype=np.int64)
        if shuffle:
            order = order[Permutation(len(kept), key_of(seed, 0, _FILL))(np.arange(len(kept)))]
        self.left_out = shards.n_documents - len(kept)
        self._order, self._starts, self._lengths = order, starts, lengths
        self._rows = _fill(lengths[order], sequence_length)
        self.count = len(self._rows) - 1

    def sample(self, index: int) -> Sample:
        """Row of a global sample index (0 or more)."""
        epoch, place = divmod(index, self.count)
        row = place
        if self.shuffle:
            row = int(Permutation(self.count, key_of(self.seed, epoch, _ORDER))(place))
        tokens: list[npt.NDArray[np.int64]] = []
        labels: list[npt.NDArray[np.int64]] = []
        for number in self._order[self._rows[row] : self._rows[row + 1]]:
            start = int(self._starts[number])
            tokens.append(self.shards.read(start, start + int(self._lengths[number])))
            labels.append(self.shards.labels_of(start, tokens[-1]))
        begins = np.cumsum(np.array([len(one) for one in tokens[:-1]], dtype=np.int64))
        return Sample(np.concatenate(tokens), begins, np.concatenate(labels))


def _fill(lengths: npt.NDArray[np.int64], most: int) -> list[int]:
    """Where each row begins in a list of lengths, as many to a row as have room; and the end of the list."""
    begins: list[int] = []
    room = 0
    for place, length in enumerate(lengths.tolist()):
        if length > room or not begins:
            begins.append(place)
            room = most
        room -= length
    return [*begins, len(lengths)]
