"""Raw bytes: files that are one document or many between separators, packed and read back; nothing leaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.config.data import DataConfig
from plait.config.errors import ConfigError, DataError
from plait.data import documents, open_data, read_documents
from plait.data.byte_shards import pack_bytes
from plait.data.documents import Document
from plait.data.sources import held_out, resolve_sources
from plait.tokenizers.bytes import BytesTokenizer


def found(folder: Path, separator: int | None = None, **options: object) -> list[tuple[str, bytes, bool]]:
    return [
        (d.name, d.text, d.continues)
        for d in read_documents(str(folder), "bytes", separator=separator, **options)  # type: ignore[arg-type, misc]
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "bytes"
    root.mkdir()
    (root / "shard_00000.bin").write_bytes(b"one\xff\x00\x00two\n\x00three")
    (root / "shard_00001.bin").write_bytes(b"\x00four\x00")
    return root


def test_a_file_is_one_document_or_many(folder: Path) -> None:
    assert [text for _, text, _ in found(folder)] == [b"one\xff\x00\x00two\n\x00three", b"\x00four\x00"]
    assert found(folder, 0) == [
        ("shard_00000.bin#1", b"one\xff", False),
        ("shard_00000.bin#3", b"two\n", False),
        ("shard_00000.bin#4", b"three", False),
        ("shard_00001.bin#2", b"four", False),
    ]
    assert [text for _, text, _ in found(folder, ord("o"))] == [
        *(b"ne\xff\x00\x00tw", b"\n\x00three"),
        *(b"\x00f", b"ur\x00"),
    ]


def test_the_ending_says_that_it_is_bytes(folder: Path) -> None:
    (folder / "more.txt").write_text("five\0six")
    sources = resolve_sources(str(folder), separator=0)
    assert [(s.name, s.format, s.separator) for s in sources] == [
        ("more.txt", "text", None),
        ("shard_00000.bin", "bytes", 0),
        ("shard_00001.bin", "bytes", 0),
    ]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 8, 13])
def test_pieces_lose_nothing_and_know_what_they_belong_to(folder: Path, piece: int, monkeypatch) -> None:
    whole = [text for _, text, _ in found(folder, 0)]
    monkeypatch.setattr(documents, "PIECE_BYTES", piece)
    joined: list[bytes] = []
    for name, text, continues in found(folder, 0):
        assert text, name
        if continues:
            joined[-1] += text
        else:
            joined.append(text)
    assert joined == whole


def test_documents_are_held_out_by_their_number(folder: Path) -> None:
    text = b"".join(b"%d," % n for n in range(200))
    (folder / "shard_00000.bin").write_bytes(text)
    sides = {
        split: {name for name, _, _ in found(folder, ord(","), split=split, fraction=0.2)}
        for split in ("all", "train", "validation")
    }
    assert not sides["train"] & sides["validation"] and sides["train"] | sides["validation"] == sides["all"]
    assert sides["validation"] == {name for name in sides["all"] if held_out(name, 0.2)}
    assert 15 < len(sides["validation"]) < 70


def test_of_files_without_separators_whole_ones_or_the_end_of_the_largest_are_held_out(folder: Path) -> None:
    (folder / "shard_00001.bin").unlink()
    (folder / "shard_00000.bin").write_bytes(bytes(range(200)))
    train, validation = (
        found(folder, None, split=split, fraction=0.25)[0][1] for split in ("train", "validation")
    )
    assert train + validation == bytes(range(200)) and len(validation) >= 50


@pytest.mark.parametrize("shard_bytes", [1, 9, 1000])
def test_what_is_packed_is_read_back(tmp_path: Path, shard_bytes: int) -> None:
    given = [
        Document("a", "one"),
        Document("b", ""),
        Document("c", b"tw\xff"),
        Document("c", b"o\n", continues=True),
        Document("d", "dreißig"),
        Document("e", "4"),
    ]
    packed = pack_bytes(given, tmp_path / "out", 0, shard_bytes)
    texts = [b"one", b"tw\xffo\n", "dreißig".encode(), b"4"]
    assert (packed.documents, packed.bytes) == (4, sum(map(len, texts)))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [f"shard_{n:05d}.bin" for n in range({1: 4, 9: 3, 1000: 1}[shard_bytes])]
    assert len(files) == packed.files
    assert [text for _, text, _ in found(tmp_path / "out", 0)] == texts
    assert b"".join((tmp_path / "out" / name).read_bytes() for name in files) == b"".join(
        t + b"\0" for t in texts
    )


def test_what_cannot_be_packed_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"^b holds the byte 0 that is to end documents; choose"):
        pack_bytes([Document("a", "x"), Document("b", "y\0")], out, 0)
    with pytest.raises(DataError, match="no text to pack"):
        pack_bytes([Document("a", "")], out, 0)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(DataError, match="is there already"):
        pack_bytes([Document("a", "x")], out, 0)


def test_a_separator_without_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"data.separator is 10, but none of the files holds raw bytes"):
        resolve_sources(str(tmp_path), separator=10)
    with pytest.raises(ConfigError, match="separator"):
        DataConfig(separator=256)
    (tmp_path / "b.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="has no labels"):
        list(read_documents(str(tmp_path / "b.bin"), label_field="label"))


def test_a_config_reads_them_and_the_separator_counts(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(
        train=str(folder), format="bytes", separator=0, validation_fraction=0, cache=str(tmp_path / "cache")
    )
    tokenizer = BytesTokenizer()
    shards, validation = open_data(config, tokenizer)
    assert validation is None and shards.n_documents == 4
    assert [bytes(shards.document(n)[1:].tolist()) for n in range(4)] == [
        b"one\xff",
        b"two\n",
        b"three",
        b"four",
    ]
    whole, _ = open_data(config.replace(separator=None), tokenizer)
    assert whole.folder != shards.folder and whole.n_documents == 2


def last_file(tmp_path: Path, *names: str) -> DataConfig:
    for number, name in enumerate(names):
        (tmp_path / name).write_text(f"text {number} of {name}\n" * 3)
    return DataConfig(
        train=str(tmp_path / "*.txt"), validation_split="last_file", cache=str(tmp_path / "cache")
    )


def test_the_last_file_is_held_out_whole(tmp_path: Path) -> None:
    config = last_file(tmp_path, "c.txt", "a.txt", "b.txt")
    for fraction in (0.0, 0.5):
        train, validation = open_data(config.replace(validation_fraction=fraction), BytesTokenizer())
        assert validation is not None and (train.n_documents, validation.n_documents) == (2, 1)
        texts = [bytes(train.document(n)[1:].tolist()) for n in range(2)]
        assert [text[:15] for text in texts] == [b"text 1 of a.txt", b"text 2 of b.txt"]
        assert bytes(validation.document(0)[1:].tolist()).startswith(b"text 0 of c.txt")
    options = {"validation_split": "last_file", "split": "train"}
    assert [d.name for d in read_documents(config.train, **options)] == ["a.txt", "b.txt"]  # type: ignore[arg-type]


def test_one_file_cannot_be_both(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"last_file needs two files at least.*there is a.txt"):
        open_data(last_file(tmp_path, "a.txt"), BytesTokenizer())


def test_named_validation_files_come_before_any_split(tmp_path: Path) -> None:
    config = last_file(tmp_path, "a.txt", "b.txt")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x.md").write_text("held out")
    train, validation = open_data(config.replace(validation=str(tmp_path / "held")), BytesTokenizer())
    assert validation is not None and (train.n_documents, validation.n_documents) == (2, 1)
