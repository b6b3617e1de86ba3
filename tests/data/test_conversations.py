"""Conversations as data: what is read, what is learnt, which share a row, in which order."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.config.data import DataConfig
from plait.config.errors import DataError, TokenizerError
from plait.data.batch import IGNORED
from plait.data.conversations import (
    ConversationRows,
    Conversations,
    conversation_texts,
    open_conversations,
    prepare_conversations,
)
from plait.data.packing import Packer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.chat import ChatTemplate, with_chat_tokens

BYTES = with_chat_tokens(BytesTokenizer())
TEMPLATE = ChatTemplate(BYTES)


def talk(number: int, length: int = 1) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"question {number}" + "?" * (number % 7)},
        {"role": "assistant", "content": f"answer {number} " * length},
    ]


def written(folder: Path, conversations: list[Any], name: str = "chat.jsonl") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in conversations))
    return str(path)


def shard(folder: Path, conversations: list[Any], **options: Any) -> Conversations:
    return prepare_conversations(written(folder, conversations), BYTES, cache=folder / "cache", **options)


def test_each_conversation_is_a_document_with_the_templates_mask(tmp_path: Path) -> None:
    """Given as an object or as the bare list of messages, as nanochat's own files hold them."""
    talks = [talk(i, 1 + i % 3) for i in range(8)]
    made = shard(tmp_path, [{"messages": one, "source": 3} if i % 2 else one for i, one in enumerate(talks)])
    assert made.n_documents == 8
    for number, one in enumerate(talks):
        ids, mask = TEMPLATE.render(one)
        start = int(made.bounds[number])
        assert made.document(number).tolist() == ids
        assert made.mask[start : start + len(ids)].tolist() == mask
        labels = made.labels_of(start, made.document(number))
        assert labels.tolist() == [i if bit else IGNORED for i, bit in zip(ids, mask, strict=True)]
    assert made.n_bytes == sum(len(message["content"].encode()) for one in talks for message in one)


def test_parquet_holds_them_too(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    talks = [talk(i) for i in range(5)]
    path = tmp_path / "chat.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": talks, "id": list(range(5))}), path)
    made = prepare_conversations(str(path), BYTES, cache=tmp_path)
    assert [made.document(i).tolist() for i in range(5)] == [TEMPLATE.render(one).ids for one in talks]
    pyarrow.parquet.write_table(pyarrow.table({"message": talks}), path)
    with pytest.raises(DataError, match="there is no column 'messages'"):
        prepare_conversations(str(path), BYTES, cache=tmp_path)


def test_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    first = shard(tmp_path, [talk(i) for i in range(3)], progress=done.append)
    assert done[-1] == first.n_bytes
    with monkeypatch.context() as patch:
        patch.setattr(ChatTemplate, "render", None)
        path = str(tmp_path / "chat.jsonl")
        assert prepare_conversations(path, BYTES, cache=tmp_path / "cache").folder == first.folder
    more = with_chat_tokens(BytesTokenizer(["<|bos|>"]))
    assert prepare_conversations(path, more, cache=tmp_path / "cache").folder != first.folder
    assert shard(tmp_path, [talk(i) for i in range(4)]).folder != first.folder


def test_a_damaged_mask_is_refused(tmp_path: Path) -> None:
    made = shard(tmp_path, [talk(1)])
    mask = made.folder / "mask.bin"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"mask\.bin has \d+ bytes instead of"):
        Conversations(made.folder, BYTES)
    mask.unlink()
    with pytest.raises(DataError, match=r"mask\.bin is missing"):
        Conversations(made.folder, BYTES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": ', r"chat\.jsonl:2: not a line of JSON"),
        ('"hello"', r"chat\.jsonl:2: a conversation is a list of messages"),
        ('{"text": "hello"}', r"chat\.jsonl:2: a conversation needs the key 'messages'"),
        ('[{"role": "user", "content": "hi"}]', r"chat\.jsonl:2: the assistant says nothing"),
        ('[{"role": "assistant", "content": "hi"}]', r"chat\.jsonl:2: message 1 is the assistant's"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{json.dumps(talk(1))}\n{line}\n")
    with pytest.raises(DataError, match=message):
        prepare_conversations(str(path), BYTES, cache=tmp_path / "cache")
    assert not any((tmp_path / "cache").glob("*"))


def test_what_holds_no_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lines of JSONL or rows of Parquet.*data\.format: jsonl"):
        prepare_conversations(written(tmp_path, [talk(1)], "chat.txt"), BYTES, cache=tmp_path)
    path = str(tmp_path / "chat.txt")
    assert prepare_conversations(path, BYTES, cache=tmp_path, format="jsonl").n_documents == 1
    with pytest.raises(DataError, match=r"no conversation in .*: none is there"):
        prepare_conversations(written(tmp_path, [], "empty.jsonl"), BYTES, cache=tmp_path)
    with pytest.raises(TokenizerError, match="for conversations"):
        prepare_conversations(path, BytesTokenizer(), cache=tmp_path, format="jsonl")


def config(folder: Path, **values: Any) -> DataConfig:
    return DataConfig(cache=str(folder / "cache"), **{"train": str(folder / "chat.jsonl"), **values})


def first_words(shards: Conversations) -> list[list[int]]:
    return [shards.document(i).tolist() for i in range(shards.n_documents)]


def test_held_out_conversations_are_others(tmp_path: Path) -> None:
    talks = [talk(i) for i in range(60)]
    written(tmp_path, talks)
    train, validation = open_conversations(config(tmp_path, validation_fraction=0.3), BYTES)
    assert validation is not None and 5 < validation.n_documents < 30
    both = first_words(train) + first_words(validation)
    assert sorted(both) == sorted(TEMPLATE.render(one).ids for one in talks)
    assert open_conversations(config(tmp_path, validation_fraction=0.0), BYTES)[1] is None
    other = written(tmp_path, [talk(99)], "other.jsonl")
    train, validation = open_conversations(config(tmp_path, validation=other), BYTES)
    assert train.n_documents == 60 and validation is not None
    assert first_words(validation) == [TEMPLATE.render(talk(99)).ids]
    files = [str(tmp_path / "chat.jsonl"), other]
    train, validation = open_conversations(config(tmp_path, train=files, validation_split="last_file"), BYTES)
    assert (train.n_documents, validation is not None and validation.n_documents) == (60, 1)
    with pytest.raises(DataError, match=r"validation_fraction 1e-09 leaves no conversation for validation"):
        open_conversations(config(tmp_path, validation_fraction=1e-9), BYTES)
    with pytest.raises(DataError, match=r"data\.train"):
        open_conversations(DataConfig(), BYTES)


def test_a_tokenizer_is_trained_on_what_is_said_in_training(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "python", "text": "b"}]
    talks = [[talk(i)[0], {"role": "assistant", "content": parts}] for i in range(30)]
    written(tmp_path, talks)
    said = list(conversation_texts(config(tmp_path, validation_fraction=0.4)))
    train, _ = open_conversations(config(tmp_path, validation_fraction=0.4), BYTES)
    assert 0 < train.n_documents < 30 and len(said) == 3 * train.n_documents
    assert said[1:3] == ["a", "b"] and said[0].startswith("question")
    files = [str(tmp_path / "chat.jsonl"), written(tmp_path, [talk(7)], "last.jsonl")]
    last = config(tmp_path, train=files, validation_split="last_file")
    assert len(list(conversation_texts(last))) == 90
    written(tmp_path, [["wrong"]], "last.jsonl")
    with pytest.raises(DataError, match=r"last\.jsonl:1: message 1"):
        list(conversation_texts(config(tmp_path, train=files, validation_fraction=0.0)))


def rows_of(tmp_path: Path, count: int = 23, length: int = 120, **options: Any) -> ConversationRows:
    made = shard(tmp_path, [talk(i, 1 + i % 4) for i in range(count)])
    return ConversationRows(made, length, **options)


def documents(sample: Any) -> list[list[int]]:
    return [part.tolist() for part in np.split(sample.tokens, sample.starts)]


def test_rows_hold_whole_conversations_each_once_an_epoch(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    expected = sorted(TEMPLATE.render(talk(i, 1 + i % 4)).ids for i in range(23))
    for epoch in range(3):
        samples = [rows.sample(epoch * rows.count + i) for i in range(rows.count)]
        assert sorted(one for sample in samples for one in documents(sample)) == expected
        assert all(len(sample.tokens) <= 120 for sample in samples)
    assert rows.count < 23 and max(len(documents(rows.sample(i))) for i in range(rows.count)) > 1
    joined = [a.tolist() for a in (rows.sample(0).tokens, rows.sample(1).tokens)]
    assert len(joined[0]) + len(joined[1]) > 120  # rows are filled as far as they go
    for sample in samples:
        for tokens, labels in zip(documents(sample), np.split(sample.labels, sample.starts), strict=True):
            _, mask = TEMPLATE.render(TEMPLATE.parse(tokens))
            assert labels.tolist() == [i if bit else IGNORED for i, bit in zip(tokens, mask, strict=True)]


def test_order_is_a_pure_function_of_seed_epoch_and_place(tmp_path: Path) -> None:
    def order(rows: ConversationRows, epoch: int) -> list[list[int]]:
        return [rows.sample(epoch * rows.count + i).tokens.tolist() for i in range(rows.count)]

    rows = rows_of(tmp_path, seed=1)
    again = rows_of(tmp_path, seed=1)
    assert order(rows, 2) == order(again, 2) and order(rows, 0) == order(again, 0)
    assert order(rows, 0) != order(rows, 1) and sorted(order(rows, 0)) == sorted(order(rows, 1))
    assert order(rows_of(tmp_path, seed=2), 0) != order(rows, 0)
    plain = rows_of(tmp_path, shuffle=False)
    in_order = [one for i in range(plain.count) for one in documents(plain.sample(i))]
    assert in_order == [TEMPLATE.render(talk(i, 1 + i % 4)).ids for i in range(23)]
    assert order(plain, 0) == order(plain, 5)


def test_a_conversation_longer_than_a_row_keeps_its_beginning(tmp_path: Path) -> None:
    long_question = [{"role": "user", "content": "q" * 40}, {"role": "assistant", "content": "never read"}]
    talks = [talk(1), talk(2, 30), long_question]
    rows = ConversationRows(shard(tmp_path, talks), 40, shuffle=False)
    found = [one for i in range(rows.count) for one in documents(rows.sample(i))]
    assert found == [TEMPLATE.render(one, 40).ids for one in talks[:2]]
    assert rows.left_out == 1  # nothing of it was to be learnt
    with pytest.raises(DataError, match=r"data\.sequence_length: 5 cuts every conversation"):
        ConversationRows(shard(tmp_path, talks), 5)


def test_a_batch_bounds_every_conversation(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    samples = [rows.sample(i) for i in range(3)]
    batch = Packer(120)(samples)
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.tolist()
    talks = [one for sample in samples for one in documents(sample)]
    assert [batch.input_ids[0, a:b].tolist() for a, b in pairwise(bounds) if a < b] == talks
    mask = [bit for one in talks for bit in TEMPLATE.render(TEMPLATE.parse(one)).mask]
    assert (batch.labels[0] != IGNORED).tolist() == [bool(bit) for bit in mask]
    assert batch.n_targets == sum(mask) and batch.n_tokens == len(mask)
    assert torch.equal(batch.labels[0][torch.tensor(mask) == 1], batch.input_ids[0][torch.tensor(mask) == 1])
