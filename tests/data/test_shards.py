"""Token shards: prepared once, found again, refused when they are not what they should be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plait.config.data import DataConfig, TokenizerConfig
from plait.config.errors import DataError
from plait.config.machine import cache_folder
from plait.data import TokenShards, documents, open_data, prepare, shards, write_shards
from plait.tokenizers import train_tokenizer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.characters import CharactersTokenizer

BYTES = BytesTokenizer()
BOS, EOS = BYTES.bos_id, BYTES.eos_id


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    for name, content in {
        "a.txt": b"abc",
        "b.txt": b"",
        "c.txt": b"\xff\xfe",
        "d.txt": "dé".encode(),
    }.items():
        (root / name).write_bytes(content)
    return root


def make(corpus: Path, tokenizer=BYTES, **more) -> TokenShards:
    return prepare(str(corpus), tokenizer, cache=corpus.parent / "cache", **more)


def stream(shard: TokenShards) -> list[int]:
    return shard.read(0, shard.n_tokens).tolist()


def test_documents_begin_with_bos_and_may_end_with_eos(corpus: Path) -> None:
    shard = make(corpus)
    assert stream(shard) == [BOS, *b"abc", BOS, 255, 254, BOS, *"dé".encode()]
    assert shard.bounds.tolist() == [0, 4, 7, 11]
    assert (shard.n_documents, shard.n_tokens, shard.n_bytes) == (3, 11, 8)
    assert shard.document(1).tolist() == [BOS, 255, 254]
    assert shard.starts(0, 11).tolist() == [0, 4, 7]
    assert shard.starts(1, 7).tolist() == [4]
    (corpus / "x.jsonl").write_text('{"text": ""}\n' * 3 + '{"text": "e"}\n{"text": ""}\n')
    assert stream(make(corpus))[11:] == [BOS, *b"e"]
    (corpus / "x.jsonl").unlink()
    assert stream(make(corpus, eos=True)) == [BOS, *b"abc", EOS, BOS, 255, 254, EOS, BOS, *"dé".encode(), EOS]


def test_every_tokenizer_writes_what_it_encodes(corpus: Path) -> None:
    for kind in ("bpe", "characters", "wordpiece"):
        tokenizer = train_tokenizer(TokenizerConfig(type=kind, vocab_size=300), ["abc dé"])
        shard = make(corpus, tokenizer)
        expected = [tokenizer.encode(b) for b in (b"abc", b"\xff\xfe", "dé".encode())]
        assert [shard.document(i)[1:].tolist() for i in range(3)] == expected
        assert shard.n_bytes == 8


def test_pieces_of_a_long_file_are_one_document(corpus: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 16)
    (corpus / "b.txt").write_bytes(b"a line\n" * 100)
    shard = make(corpus, eos=True)
    assert shard.n_documents == 4
    assert shard.document(1).tolist() == [BOS, *b"a line\n" * 100, EOS]


def test_prepared_once_and_anew_when_anything_changes(corpus: Path, monkeypatch) -> None:
    shard = make(corpus)
    monkeypatch.setattr(shards.ShardWriter, "add", lambda *args, **kwargs: pytest.fail("encoded again"))
    assert make(corpus).folder == shard.folder
    monkeypatch.undo()
    folders = {shard.folder}
    os.utime(corpus / "a.txt", ns=(1, 1))
    folders.add(make(corpus).folder)
    (corpus / "b.txt").write_bytes(b"more")
    folders.add(make(corpus).folder)
    (corpus / "b.txt").rename(corpus / "e.txt")
    folders.add(make(corpus).folder)
    folders.add(make(corpus, CharactersTokenizer("abcd")).folder)
    folders.add(make(corpus, BytesTokenizer(("<|bos|>",))).folder)
    folders.add(make(corpus, eos=True).folder)
    folders.add(make(corpus, split="train", fraction=0.3).folder)
    folders.add(make(corpus, split="validation", fraction=0.3).folder)
    assert len(folders) == 9


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    narrow = write_shards(tmp_path / "n", [[0, 65535]], 65536)
    wide = write_shards(tmp_path / "w", [[0, 65536]], 65537)
    assert (narrow.dtype, wide.dtype) == (np.uint16, np.uint32)
    assert (stream(narrow), stream(wide)) == ([0, 65535], [0, 65536])
    assert (tmp_path / "w" / "tokens.bin").stat().st_size == 8


@pytest.mark.parametrize("wrong", [-1, 10, 70000])
def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(DataError, match=rf"token id {wrong} is outside the vocabulary 0 \.\. 9"):
        write_shards(tmp_path, [[1, 2], [3, wrong]], 10)
    with pytest.raises(DataError, match=r"index\.json cannot be read"):
        TokenShards(tmp_path)


def test_a_changed_token_is_refused_when_read(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [[1, 2, 3]], 10)
    np.array([1, 2, 99], dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    with pytest.raises(DataError, match=r"tokens\.bin holds token id 99, outside the vocabulary 0 \.\. 9"):
        TokenShards(tmp_path).read(0, 3)
    assert shard.vocab_size == 10


def test_a_model_with_fewer_ids_is_refused(corpus: Path) -> None:
    shard = make(corpus)
    shard.check_vocabulary(260)
    with pytest.raises(DataError, match=r"ids up to 259, the model's vocabulary is 259"):
        shard.check_vocabulary(259)


def test_another_tokenizer_is_refused(corpus: Path) -> None:
    shard = make(corpus)
    TokenShards(shard.folder, BytesTokenizer())
    with pytest.raises(DataError, match="made with another tokenizer"):
        TokenShards(shard.folder, BytesTokenizer(("<|bos|>", "<|eos|>", "<|mask|>", "<|pad|>")))


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_a_truncated_or_missing_file_is_refused_by_name(corpus: Path, name: str) -> None:
    path = make(corpus).folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"{name} has {len(whole) - 2} bytes instead of {len(whole)}"):
        make(corpus)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        make(corpus)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"version": 1, "dtype": "int8"}', '{"version": 2}'])
def test_a_damaged_index_is_refused(corpus: Path, index: str) -> None:
    shard = make(corpus)
    (shard.folder / "index.json").write_text(index)
    with pytest.raises(DataError, match=r"index\.json.*prepare the data again"):
        make(corpus)


def test_a_full_disk_leaves_nothing(corpus: Path, monkeypatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written to .*: No space left on device"):
        make(corpus)
    assert list((corpus.parent / "cache").iterdir()) == []
    monkeypatch.undo()
    make(corpus)


def test_a_bad_line_in_the_middle_leaves_nothing(corpus: Path) -> None:
    (corpus / "x.jsonl").write_text('{"text": "fine"}\n' * 1000 + "broken\n")
    with pytest.raises(DataError, match=r"x\.jsonl:1001: not a line of JSON"):
        make(corpus)
    assert list((corpus.parent / "cache").iterdir()) == []


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no text"):
        prepare(str(tmp_path), BYTES, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_documents_need_a_mark(corpus: Path) -> None:
    with pytest.raises(DataError, match="has no bos or eos token"):
        make(corpus, BytesTokenizer(("<|pad|>",)))
    with pytest.raises(DataError, match="has no eos token"):
        make(corpus, BytesTokenizer(("<|bos|>",)), eos=True)
    shard = make(corpus, BytesTokenizer(("<|eos|>",)))
    assert shard.document(0).tolist() == [256, *b"abc"]


def test_progress_counts_bytes(corpus: Path) -> None:
    seen: list[int] = []
    make(corpus, progress=seen.append)
    assert seen[-1] == 8


def test_a_config_names_both_sides(corpus: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300)))
    config = DataConfig(train=str(rows), validation_fraction=0.1, cache=str(tmp_path / "cache"))
    train, validation = open_data(config, BYTES)
    assert validation is not None
    assert train.n_documents + validation.n_documents == 300 and validation.n_documents > 10
    whole, none = open_data(config.model_copy(update={"validation_fraction": 0.0}), BYTES)
    assert (whole.n_documents, none) == (300, None)
    whole, other = open_data(config.model_copy(update={"validation": str(corpus), "add_eos": True}), BYTES)
    assert other is not None
    assert (whole.n_documents, other.n_documents, other.document(0)[-1]) == (300, 3, EOS)
    with pytest.raises(DataError, match=r"data\.train: no text is named"):
        open_data(DataConfig(), BYTES)
    rows.write_text('{"text": "only one"}\n')
    with pytest.raises(DataError, match=r"validation_fraction 0\.1 leaves no document for validation"):
        open_data(config, BYTES)


def test_the_cache_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PLAIT_CACHE", raising=False)
    assert cache_folder() == tmp_path / "plait"
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder("given") == Path("given")


def test_preparing_does_not_import_torch() -> None:
    code = "import plait.data, sys; print([n for n in ('torch', 'pyarrow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
