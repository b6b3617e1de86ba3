"""Corpora in: files, folders, globs, JSONL, Parquet, the standard library; what is held out and refused."""

from __future__ import annotations

import builtins
import bz2
import gzip
import lzma
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from plait.config.data import DataConfig
from plait.config.errors import DataError
from plait.data import documents, held_out, open_data, read_documents
from plait.data.sources import resolve_sources
from plait.data.stdlib import HELD_OUT_FRACTION, stdlib_files
from plait.tokenizers.bytes import BytesTokenizer


def texts(*args, **kwargs) -> list[tuple[str, str | bytes]]:
    return [(document.name, document.text) for document in read_documents(*args, **kwargs)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b.txt").write_bytes(b"caf\xe9\r\n")
    (root / "deep" / "er" / "a.py").write_text("x = 1\n")
    (root / "rows.jsonl").write_text('{"text": "one", "n": 1}\n\n{"n": 2, "text": "tw\\u00f6"}\n')
    (root / ".hidden").write_text("no")
    (root / ".git" / "config").write_text("no")
    return root


def test_a_folder_is_read_to_the_bottom_in_a_fixed_order(folder: Path) -> None:
    expected = [
        ("b.txt", b"caf\xe9\r\n"),
        ("deep/er/a.py", b"x = 1\n"),
        ("rows.jsonl#1", "one"),
        ("rows.jsonl#3", "twö"),
    ]
    assert texts(str(folder)) == expected
    assert texts([str(folder / "rows.jsonl"), str(folder)]) == [*expected[2:], *expected[:2]]  # no file twice


def test_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    assert texts([str(tmp_path / "x"), str(tmp_path / "y")]) == [("a.txt", b"x"), ("a.txt", b"y")]


def test_globs_name_files_below_their_fixed_part(folder: Path) -> None:
    assert [name for name, _ in texts(f"{folder}/**/*.py")] == ["deep/er/a.py"]
    assert [name for name, _ in texts(f"{folder}/*.txt")] == ["b.txt"]
    (folder / "odd[1].txt").write_text("odd")
    assert texts(str(folder / "odd[1].txt")) == [("odd[1].txt", b"odd")]


def test_the_format_can_be_said(folder: Path) -> None:
    assert texts(str(folder / "rows.jsonl"), "text")[0][1].startswith(b'{"text"')
    (folder / "lines").write_text('{"body": "x"}')
    assert texts(str(folder / "lines"), "jsonl", "body") == [("lines#1", "x")]
    with pytest.raises(DataError, match=r"'json' is none of .* \(did you mean 'jsonl'\?\)"):
        texts(str(folder), "json")


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_packed_files_are_read_as_they_are(tmp_path: Path, suffix: str, pack) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b'{"text": "one"}\n'))
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"line\n" * 1000))
    assert texts(str(tmp_path)) == [(f"a.jsonl{suffix}#1", "one"), (f"a.txt{suffix}", b"line\n" * 1000)]
    train = texts(str(tmp_path / f"a.txt{suffix}"), split="train", fraction=0.1)
    assert train == [(f"a.txt{suffix}", b"line\n" * 901)]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"line\n" * 1000)[:30])
    with pytest.raises(DataError, match=r"a\.txt\S+ cannot be read"):
        texts(str(tmp_path))


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"t{i}" for i in range(3000)], "other": list(range(3000))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert texts(str(tmp_path)) == [(f"a.parquet#{i + 1}", f"t{i}") for i in range(3000)]
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'txt' \(did you mean 'text'\?\)"):
        texts(str(tmp_path), "auto", "txt")
    with pytest.raises(DataError, match=r"a\.parquet:1: field 'other' is not a text but int"):
        texts(str(tmp_path), "auto", "other")
    (tmp_path / "a.parquet").write_bytes(b"PAR1junk")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        texts(str(tmp_path))


def test_the_last_parquet_file_is_held_out_and_each_document_begins_with_its_token(tmp_path: Path) -> None:
    """nanochat's data: files in the order of their names, one column of text."""
    for number in range(3):
        table = pyarrow.table({"text": [f"doc {number}.{row}" for row in range(4)]})
        pyarrow.parquet.write_table(table, tmp_path / f"shard_{number:05d}.parquet", row_group_size=2)
    config = DataConfig(
        train=str(tmp_path), format="parquet", validation_split="last_file", cache=str(tmp_path / ".cache")
    )
    tokenizer = BytesTokenizer()
    train, validation = open_data(config, tokenizer)
    assert validation is not None and (train.n_documents, validation.n_documents) == (8, 4)
    for shards, first in ((train, b"doc 0.0"), (validation, b"doc 2.0")):
        assert shards.document(0).tolist() == [tokenizer.bos_id, *first]
    texts = [bytes(validation.document(n)[1:].tolist()) for n in range(4)]
    assert texts == [f"doc 2.{row}".encode() for row in range(4)]


def test_absent_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'plait\[data\]'"):
        texts(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "unfinished', "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ('["text"]', "must be an object, not list"),
        ('{"txt": "x", "b": 1}', r"no field 'text' \(did you mean 'txt'\?\); the line has 'txt', 'b'"),
        ('{"text": null}', "field 'text' is not a text but NoneType"),
        ("\udcff", "not a line of JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "fine"}\n\n' + line.encode("utf-8", "surrogateescape") + b'\n{"text": "fine"}\n'
    )
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{words}") as caught:
        texts(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{}/missing.txt", "there is no file or folder"),
        ("{}/*.nothing", "no file matches"),
        ("{}/empty", "holds no file"),
        ("{}/a.zip", "is an archive"),
        ([], "no file is named"),
    ],
)
def test_what_matches_nothing_is_refused(tmp_path: Path, spec, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=words):
        texts(spec.format(tmp_path) if isinstance(spec, str) else spec)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "locked.txt"
    path.write_text("x")

    def locked(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(documents, "open", locked, raising=False)
    with pytest.raises(DataError, match=r"locked\.txt cannot be read: Permission denied"):
        texts(str(path))


def test_held_out_documents_are_chosen_by_the_hash_of_their_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(4000)))
    train = texts(str(path), split="train", fraction=0.1)
    validation = texts(str(path), split="validation", fraction=0.1)
    assert 320 < len(validation) < 480
    assert all(held_out(name, 0.1) for name, _ in validation)
    assert sorted(train + validation) == sorted(texts(str(path)))
    more = texts(str(path), split="validation", fraction=0.2)
    assert set(validation) < set(more)  # a larger fraction only adds
    # Known answers: the split may never change between versions or machines.
    assert [i for i in range(1, 100) if held_out(f"rows.jsonl#{i}", 0.1)] == KNOWN
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    path.rename(moved / "rows.jsonl")
    assert texts(str(moved), split="validation", fraction=0.1) == validation


KNOWN = [31, 40, 43, 47, 48, 49, 56, 91, 94, 96]


def test_of_too_few_text_files_the_largest_is_cut(tmp_path: Path) -> None:
    lines = [b"line %d\n" % i for i in range(1000)]
    (tmp_path / "long.txt").write_bytes(b"".join(lines))
    train = texts(str(tmp_path), split="train", fraction=0.1)
    validation = texts(str(tmp_path), split="validation", fraction=0.1)
    (_, head), (_, tail) = *train, *validation
    assert head + tail == b"".join(lines)
    assert head.endswith(b"\n") and 0.095 < len(tail) / len(head + tail) < 0.1
    (tmp_path / "short.txt").write_bytes(b"short")
    assert [name for name, _ in texts(str(tmp_path), split="train", fraction=1e-9)] == [
        "long.txt",
        "short.txt",
    ]
    assert [name for name, _ in texts(str(tmp_path), split="validation", fraction=1e-9)] == ["long.txt"]


def test_long_files_come_in_pieces_that_lose_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    for content in (b"some line\n" * 100, "ж🙂".encode() * 100, b"\x80" * 300, b"a" * 64 + b"\n"):
        (tmp_path / "a.txt").write_bytes(content)
        pieces = list(read_documents(str(tmp_path)))
        assert b"".join(piece.text for piece in pieces) == content
        assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
        assert all(len(piece.text) <= 128 for piece in pieces)
        if content[:1] == b"s":
            assert all(piece.text.endswith(b"\n") for piece in pieces)
        if content[:1] == "ж".encode()[:1]:
            assert "".join(piece.text.decode() for piece in pieces) == content.decode()


def test_reading_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbroken\n')
    stream = read_documents(str(tmp_path))
    assert next(stream).text == "one"
    with pytest.raises(DataError, match=":2: not a line of JSON"):
        next(stream)


def test_the_standard_library() -> None:
    files = stdlib_files()
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(names)
    assert not [
        name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1])
    ]
    assert all(
        name.endswith(".py") and name.split("/")[0].removesuffix(".py") in sys.stdlib_module_names
        for name in names
    )
    sizes = {name: path.stat().st_size for name, path in files}
    share = sum(sizes[name] for name in names if held_out(name, HELD_OUT_FRACTION)) / sum(sizes.values())
    assert 0.02 < share < 0.06
    assert [source.name for source in resolve_sources("stdlib:")] == names
