"""The originals' recipes, shrunk: each trains on its kind of data, saves, resumes bit for bit, and generates."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from plait.config.load import load_config
from plait.data.byte_shards import pack_bytes
from plait.data.documents import Document
from plait.formats.native import load_model
from plait.training import train
from plait.training.setup import set_up
from tests.training import runs
from tests.training.test_objectives import HERE

WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over"),
    *("a", "lazy", "dog", "and", "sleeps", "12", "345"),
]


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(20, 60))) for _ in range(count)]


def parquet(folder: Path) -> list[str]:
    for number in range(3):
        path = folder / "corpus" / f"shard_{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts(12, number)}), path)
    return [f"--data.train={folder / 'corpus'}"]


def plain(folder: Path) -> list[str]:
    (folder / "corpus").mkdir()
    for number, text in enumerate(texts(30, 0)):
        (folder / "corpus" / f"{number}.txt").write_text(text)
    return [f"--data.train={folder / 'corpus'}"]


def packed(folder: Path) -> list[str]:
    for seed, side in enumerate(("train", "validation")):
        documents = [Document(str(n), text) for n, text in enumerate(texts(15, seed))]
        pack_bytes(documents, folder / "corpus" / side, 0)
    return [f"--data.{side}={folder / 'corpus' / side}" for side in ("train", "validation")]


GPT = ["--model.d_model=32", "--model.attention.n_head=2", "--tokenizer.vocab_size=300"]
SHORT = ["--data.sequence_length=32", "--training.batch_tokens=128", "--training.micro_batch_tokens=64"]
RECIPES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "nanochat": (parquet, [*GPT, "--model.pattern=T*2", "--training.tokens_per_parameter=0.02"]),
    "nanochat hybrid": (parquet, [*GPT, "--model.pattern=T M T M", "--training.tokens_per_parameter=0.02"]),
    "nanochat2026": (
        parquet,
        [
            *GPT,
            "--model.pattern=[{mixer: T, window: 9}, {mixer: T, value_embedding: true}]",
            "--training.tokens_per_parameter=0.02",
        ],
    ),
    "foundry": (
        plain,
        [
            *("--model.d_model=32", "--model.n_layer=2", "--tokenizer.vocab_size=310"),
            *("--training.epochs=0.3", "--training.checkpoint_schedule.first_epoch=3"),
        ],
    ),
    "bitbyte": (
        packed,
        [
            *("--model.d_model=32", "--model.pattern=M T", "--model.mlp.width=64", "--training.steps=4"),
            "--model.attention.n_head=2",
            "--training.sequence_length_schedule=[{length: 8, until: 0.3}, {length: 16, until: 0.6}]",
        ],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_saves_resumes_and_generates(name: str, tmp_path: Path) -> None:
    make, changes = RECIPES[name]
    common = [
        *make(tmp_path),
        *SHORT,
        *changes,
        f"--data.cache={tmp_path / 'cache'}",
        "--training.device=cpu",
    ]
    common += [
        "--training.keep_checkpoints=99",
        "--training.eval_tokens=256",
        "--training.sample_every=0",
        "--training.log_every=1",
    ]
    recipe = name.split()[0]
    config = load_config(
        recipe, [*common, f"--training.out={tmp_path / 'run'}", "--training.checkpoint_every=2"]
    )
    whole = train(config, quiet=True)
    assert whole.step >= 3 and whole.validation is not None and whole.checkpoint is not None
    losses = runs.losses(whole.run)
    assert max(losses) == whole.step
    again = config.replace(training=config.training.replace(out=str(tmp_path / "again")))
    rest = train(again, resume=whole.run / "checkpoints" / "step-00000002", quiet=True)
    assert rest.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)
    model = load_model(whole.run)
    assert all(map(torch.equal, model.parameters(), whole.model.parameters()))
    prompt = torch.tensor([whole.tokenizer.encode("the quick")])
    assert model.generate(prompt, max_new_tokens=5, temperature=0).shape[1] == prompt.shape[1] + 5


def test_what_nanochat_holds_out_is_its_last_file_and_documents_begin_with_their_token(
    tmp_path: Path,
) -> None:
    words = [*parquet(tmp_path), *GPT, *SHORT, "--model.pattern=T", f"--data.cache={tmp_path / 'cache'}"]
    config = load_config("nanochat", [*words, "--training.device=cpu"])
    parts = set_up(config, tmp_path / "run", None, HERE)
    assert parts.validation is not None and parts.tokenizer.bos_id is not None
    assert parts.loader.samples.count == (parts.loader.samples.shards.n_tokens // 32)  # type: ignore[attr-defined]
    last = texts(12, 2)
    assert parts.validation.n_documents == 12
    for number, text in enumerate(last):
        ids = parts.validation.document(number).tolist()
        assert ids == [parts.tokenizer.bos_id, *parts.tokenizer.encode(text)]
    (batch, *_) = parts.batches(HERE)
    assert batch.cu_seqlens is None, "joined: rows are whole, nothing is reset at a document's beginning"
    assert parts.horizon.reason.startswith("20 tokens for each of")
