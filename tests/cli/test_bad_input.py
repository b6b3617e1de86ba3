"""What the world does to a program: each is one line of error, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from plait import api
from plait.formats.folders import list_checkpoints
from tests.cli.conftest import TINY, Run

MORE = ("--training.steps=2", "--training.out=out", "--data.cache=cache")


def train(plait: Run, *words: str) -> str:
    """The error of a training that must fail."""
    ran = plait("train", *TINY, *MORE, *words)
    assert ran.status == 1, ran
    return ran.error


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def files() -> Iterator[None]:
    Path("broken.txt.gz").write_bytes(b"this is not gzip")
    Path("empty.txt").write_text("")
    Path("folder").mkdir()
    Path("bad.jsonl").write_text('{"text": "a line"}\n{"text": \n')
    Path("good.jsonl").write_text('{"txt": "a line"}\n')
    yield
    assert not Path("out/checkpoints").exists()
    left = [
        path
        for path in Path().rglob("*")
        if path.is_file() and path.suffix in (".bin", ".tmp", ".safetensors")
    ]
    assert left == []


@pytest.mark.parametrize(
    ("train_on", "said"),
    [
        ("missing.txt", "missing.txt"),
        ("broken.txt.gz", "broken.txt.gz cannot be read"),
        ("empty.txt", "empty.txt"),
        ("folder", "the folder folder holds no file"),
        ("*.md", "no file matches *.md"),
        ("bad.jsonl", "bad.jsonl:2: not a line of JSON"),
        ("good.jsonl", "did you mean 'txt'?"),
        ("", "data.train"),
    ],
)
@pytest.mark.usefixtures("files")
def test_a_corpus_that_cannot_be_read(plait: Run, train_on: str, said: str) -> None:
    assert said in train(plait, f"--data.train={train_on}")


def test_a_corpus_without_permission(plait: Run, corpus: Path) -> None:
    if os.geteuid() == 0:  # root may read every file, but not this one
        corpus = Path("/proc/self/mem")
    else:
        corpus.chmod(0)
    assert f"{corpus} cannot be read" in train(plait, f"--data.train={corpus}")
    assert not Path("out/checkpoints").exists() and not list(Path().rglob("*.bin"))


def test_a_vocabulary_too_small_for_the_tokenizer(plait: Run, corpus: Path) -> None:
    assert "model.vocab_size is 100" in train(plait, f"--data.train={corpus}", "--model.vocab_size=100")
    assert not Path("out").exists()


def test_a_tokenizer_of_another_type(plait: Run, corpus: Path) -> None:
    assert plait("tokenizer", "train", "--data", corpus, "--out", "tok", "--vocab-size", "300").status == 0
    assert "tok holds a bpe tokenizer" in train(plait, f"--data.train={corpus}", "--tokenizer.path=tok")


def test_a_token_outside_of_the_vocabulary(plait: Run, corpus: Path) -> None:
    words = [f"--data.train={corpus}", "--data.validation_fraction=0"]
    assert plait("data", "prepare", *TINY, *MORE, *words).status == 0
    (shard,) = Path("cache").iterdir()
    tokens = np.memmap(shard / "tokens.bin", dtype=np.uint16, mode="r+")
    tokens[:] = 999
    tokens.flush()
    assert "token id 999, outside the vocabulary" in train(plait, *words)
    assert not Path("out/checkpoints").exists()


def test_a_typo_in_the_pattern(plait: Run, corpus: Path) -> None:
    assert "did you mean 'mamba2'?" in train(plait, f"--data.train={corpus}", "--model.pattern=mamba22 T")
    assert not Path("out").exists()


def test_a_checkpoint_of_another_model(plait: Run, trained: Path) -> None:
    before = digest(trained)
    ran = plait("train", "--resume", trained, "--model.d_model=32", "--training.steps=3")
    assert ran.status == 1 and "of another model: model.d_model is 16 there and 32 here" in ran.error
    assert digest(trained / "checkpoints") == digest_of(before, "checkpoints")
    # the weights of one model under the config of another
    config = trained / "checkpoints" / "step-00000002" / "config.json"
    (trained / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "d_model": 24}))
    ran = plait("generate", trained, "x")
    assert ran.status == 1 and "another model" in ran.error


def digest_of(whole: dict[str, str], below: str) -> dict[str, str]:
    return {
        name.removeprefix(f"{below}/"): value for name, value in whole.items() if name.startswith(f"{below}/")
    }


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    plait: Run, trained: Path, harm: str
) -> None:
    file = trained / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "cut":
        del data[-100:]
    else:
        data[-1] ^= 1
    file.write_bytes(data)
    ran = plait("train", "--resume", trained, "--training.steps=3")
    assert ran.status == 1 and "step-00000002/model.safetensors" in ran.error
    offered = ran.error.rpartition("plait train --resume ")[2]
    assert offered == str(trained / "checkpoints" / "step-00000001")
    assert "model.safetensors" in plait("generate", trained, "x").error
    assert plait("train", "--resume", offered, "--training.steps=2").status == 0


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond ``n_bytes``: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [1_000, 6_000, 20_000])
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoints(
    plait: Run, trained: Path, room: int
) -> None:
    good = trained / "checkpoints"
    before = digest(good)
    with full_disk(room):
        ran = plait("train", "--resume", trained, "--training.steps=3")
    assert ran.status == 1, ran
    assert "cannot" in ran.error
    assert digest(good) == before
    assert [path.name for path in list_checkpoints(trained)] == ["step-00000001", "step-00000002"]
    assert sorted(path.name for path in good.iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]  # no temporary folder
    api.load(trained)


def test_a_full_disk_while_preparing_data(plait: Run, corpus: Path) -> None:
    with full_disk(500):
        ran = plait("data", "prepare", "tiny", f"--data.train={corpus}", "--data.cache=cache")
    assert ran.status == 1 and "cannot be written" in ran.error
    assert list(Path("cache").iterdir()) == []


def test_a_full_disk_while_saving_a_tokenizer(plait: Run, corpus: Path) -> None:
    with full_disk(500):
        ran = plait("tokenizer", "train", "--data", corpus, "--out", "tok", "--vocab-size", "300")
    assert ran.status == 1 and "cannot save the tokenizer to tok" in ran.error
    assert not Path("tok").exists()
