"""`plait tokenizer train`, `plait data prepare` and `plait data pack`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plait.tokenizers import load_tokenizer
from tests.cli.conftest import TEXT, Run


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
def test_train_a_tokenizer_and_use_it(plait: Run, corpus: Path, kind: str) -> None:
    size = [] if kind == "characters" else ["--vocab-size", "280"]
    ran = plait("tokenizer", "train", "--type", kind, *size, "--data", corpus, "--out", "tok")
    assert ran.status == 0, ran
    trained = load_tokenizer("tok")
    assert trained.type == kind and trained.vocab_size <= 280
    assert trained.decode(trained.encode("the quick")) == "the quick"
    assert f"{trained.vocab_size} tokens" in ran.out and "bytes of it on average" in ran.out
    assert f"--tokenizer.type={kind} --tokenizer.path=tok" in ran.out
    words = [
        f"--tokenizer.type={kind}",
        "--tokenizer.path=tok",
        f"--data.train={corpus}",
        "--data.validation-fraction=0.2",
    ]
    ran = plait("data", "prepare", *words)
    assert ran.status == 0, ran
    n_tokens = sum(
        json.loads((Path(line.split()[1]) / "index.json").read_text())["tokens"]
        for line in ran.out.splitlines()
        if "tokens-" in line
    )
    assert n_tokens == len(trained.encode(TEXT)) + 2 or kind in ("wordpiece", "unigram", "bpe")
    assert n_tokens >= len(trained.encode(TEXT))


def test_special_tokens_are_never_split(plait: Run, corpus: Path) -> None:
    words = ["--special-token", "<|a|>", "--special-token", "<|b|>", "--vocab-size", "300", "--lowercase"]
    assert plait("tokenizer", "train", "--data", corpus, "--out", "tok", *words).status == 0
    assert {"<|a|>", "<|b|>"} <= set(load_tokenizer("tok").special_tokens)


def test_prepare_counts_and_finds_its_work_again(plait: Run, corpus: Path) -> None:
    words = ["tiny", f"--data.train={corpus}", "--data.validation_fraction=0.25", "--data.cache=shards"]
    ran = plait("data", "prepare", *words)
    assert ran.status == 0, ran
    folders = sorted(Path("shards").iterdir())
    assert len(folders) == 2 and all(str(folder) in ran.out for folder in folders)
    indexes = [json.loads((folder / "index.json").read_text()) for folder in folders]
    assert sum(index["bytes"] for index in indexes) == len(TEXT)
    assert sum(index["tokens"] for index in indexes) == len(TEXT) + 2  # bytes, and a bos for each document
    before = {folder: folder.stat().st_mtime_ns for folder in folders}
    assert plait("data", "prepare", *words).out == ran.out
    assert {folder: folder.stat().st_mtime_ns for folder in folders} == before
    assert "validation" in ran.out and "prepared in" in ran.err


def test_prepare_without_validation(plait: Run, corpus: Path) -> None:
    ran = plait(
        "data", "prepare", f"--data.train={corpus}", "--data.validation_fraction=0", "--data.cache=shards"
    )
    assert ran.status == 0 and "validation" not in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokenizer", "train", "--data", "none.txt", "--out", "o"], "there is no file or folder none.txt"),
        (["tokenizer", "train", "--data", "text.txt", "--out", "o", "--vocab-size", "3"], "too small"),
        (["tokenizer", "train", "--data", "empty.txt", "--out", "o"], "empty"),
        (["data", "prepare", "tiny"], "data.train: no text is named"),
        (
            ["data", "prepare", "tiny", "--data.train=text.txt", "--tokenizer.type=bpe"],
            "plait tokenizer train --type bpe",
        ),
        (
            ["data", "prepare", "tiny", "--data.train=text.txt", "--tokenizer.path=o"],
            "there is no tokenizer at o",
        ),
    ],
)
def test_what_cannot_be_done_leaves_nothing(plait: Run, corpus: Path, words: list[str], said: str) -> None:
    corpus.with_name("empty.txt").write_text("")
    before = sorted(Path().rglob("*"))
    ran = plait(*words)
    assert ran.status == 1 and ran.out == "" and said in ran.error
    assert sorted(Path().rglob("*")) == before


def test_pack_and_train_on_it(plait: Run, tmp_path: Path) -> None:
    """Two folders, no document in both; the command that is named next takes them."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number:02}.txt").write_text(f"the text with the number {number} " * 5)
    ran = plait(
        "data", "pack", texts, "--out", "packed", "--validation-fraction", "0.3", "--shard-size", "0.001"
    )
    assert ran.status == 0, ran
    documents = {
        side: [
            text
            for path in sorted((Path("packed") / side).glob("shard_*.bin"))
            for text in path.read_bytes().split(b"\0")[:-1]
        ]
        for side in ("train", "validation")
    }
    assert sorted(documents["train"] + documents["validation"]) == sorted(
        p.read_bytes() for p in texts.iterdir()
    )
    assert not set(documents["train"]) & set(documents["validation"]) and len(documents["validation"]) > 1
    assert len(list(Path("packed/train").iterdir())) > 1
    words = ran.out.split("plait train CONFIG ")[1].split()
    assert words == [
        "--data.train=packed/train",
        "--data.validation=packed/validation",
        "--data.format=bytes",
        "--data.separator=0",
    ]
    prepared = plait("data", "prepare", "tiny", *words, "--data.cache=shards")
    counts = [
        line.split()[1] for line in prepared.out.splitlines() if line.strip().startswith(("train ", "valid"))
    ]
    assert counts[:2] == [str(len(documents["train"])), str(len(documents["validation"]))]


def test_what_cannot_be_packed_leaves_nothing(plait: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a,b")
    ran = plait("data", "pack", tmp_path / "a.txt", "--out", "packed", "--separator", ord(","))
    assert ran.status == 1 and "a.txt holds the byte 44" in ran.error and not Path("packed").exists()
    (tmp_path / "b.jsonl").write_text('{"text": "one document, and none to hold out"}\n')
    ran = plait("data", "pack", tmp_path / "b.jsonl", "--out", "packed", "--validation-fraction", "1e-9")
    assert ran.status == 1 and "no text to pack" in ran.error and not Path("packed").exists()
    Path("packed").mkdir()
    assert "is there already" in plait("data", "pack", tmp_path / "a.txt", "--out", "packed").error
