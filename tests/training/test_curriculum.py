"""Shorter sequences early in a run: rows are cut, the data and its order stay, a resumed run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import plait.training.trainer as trainer_module
from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.training import TrainingConfig
from plait.data import write_shards
from plait.data.batch import IGNORED, Batch
from plait.data.loader import Loader
from plait.data.masking import MaskedRows
from plait.data.packing import Packer, Rows
from plait.tokenizers.bytes import BytesTokenizer
from plait.training import train
from plait.training.schedules import sequence_length
from tests.training import runs

STAGES = [{"length": 8, "until": 0.25}, {"length": 12, "until": 0.5}]


def lengths(longest: int, *progress: float) -> list[int]:
    config = TrainingConfig.model_validate(
        {"sequence_length_schedule": [{"length": 2048, "until": 0.2}, {"length": 4096, "until": 0.5}]}
    )
    return [sequence_length(config, longest, share) for share in progress]


def test_bitbytes_stages_and_their_cap() -> None:
    assert lengths(8192, 0.0, 0.199, 0.2, 0.499, 0.5, 1.0) == [2048, 2048, 4096, 4096, 8192, 8192]
    assert lengths(3000, 0.0, 0.2, 0.5) == [2048, 3000, 3000]
    assert sequence_length(TrainingConfig(), 77, 0.1) == 77


def test_a_recipe_says_so() -> None:
    config = load_config("bitbyte")
    found = [
        sequence_length(config.training, config.data.sequence_length, share) for share in (0.1, 0.3, 0.9)
    ]
    assert found == [2048, 4096, 8192]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [{"length": 8, "until": 0.5}, {"length": 9, "until": 0.5}],
            r"schedule\[1\].until.*stage 2 ends at 0.5",
        ),
        ([{"length": 1, "until": 0.5}], r"\[0\].length: expected a whole number greater than 1; got 1"),
        (
            [{"length": 8, "until": 1.5}],
            r"\[0\].until: expected a number greater than 0 and at most 1.*got 1.5",
        ),
        ([{"length": 8, "until": 0.5, "untill": 0.5}], r"\[0\].untill: unknown key.*did you mean 'until'"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainingConfig.model_validate({"sequence_length_schedule": stages})
    with pytest.raises(ConfigError, match="whole texts"):
        TrainingConfig.model_validate(
            {"objective": "classification", "sequence_length_schedule": [{"length": 8, "until": 0.5}]}
        )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """24 tokens a row, documents of 10 tokens."""
    documents = [[99, *range(10 * n + 1, 10 * n + 10)] for n in range(20)]
    return Rows(write_shards(tmp_path_factory.mktemp("shard"), documents, 300), 24, seed=1)


def loader(rows: Rows, **packer: Any) -> Loader:
    return Loader(rows, 4, Packer(rows.sequence_length, pad_sequences=False, **packer))


def bounds(batch: Batch) -> list[int]:
    assert batch.cu_seqlens is not None
    return batch.cu_seqlens.tolist()


@pytest.mark.parametrize("length", [8, 10, 24, 100, 1])
def test_the_tokens_and_their_order_stay(rows: Rows, length: int) -> None:
    whole, cut = loader(rows), loader(rows)
    for _ in range(5):
        (a,), (b,) = whole.micro_batches(), cut.micro_batches(length=length)
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
        own = set(bounds(a)) | {row * 24 + at for row in range(4) for at in range(0, 24, length)}
        assert bounds(b) == sorted(own)
        assert b.n_targets == b.n_tokens - (len(own) - 1)
        assert b.max_len is not None and b.max_len <= min(length, 24)
    assert whole.index == cut.index == 20


def test_joined_rows_are_dense_where_pieces_are_equal(rows: Rows) -> None:
    (even,) = loader(rows, separate=False).micro_batches(length=8)
    assert even.cu_seqlens is None and even.input_ids.shape == (12, 8) and even.n_targets == 12 * 7
    (odd,) = loader(rows, separate=False).micro_batches(length=10)
    assert bounds(odd) == sorted({row * 24 + at for row in range(4) for at in (0, 10, 20)} | {96})
    (whole,) = loader(rows, separate=False).micro_batches()
    assert whole.input_ids.shape == (4, 24)
    assert torch.equal(even.input_ids.flatten(), whole.input_ids.flatten())
    assert torch.equal(odd.input_ids.flatten(), whole.input_ids.flatten())


def test_hidden_tokens_stay_hidden(rows: Rows) -> None:
    tokenizer = BytesTokenizer(special_tokens=["<|mask|>"])
    masked = MaskedRows(rows, tokenizer, 0.3)
    packer = Packer(24, causal=False, pad_sequences=False)
    (whole,) = Loader(masked, 4, packer).micro_batches()
    (cut,) = Loader(masked, 4, packer).micro_batches(length=10)
    assert torch.equal(whole.labels, cut.labels) and torch.equal(whole.input_ids, cut.input_ids)
    assert whole.n_targets == cut.n_targets == int((whole.labels != IGNORED).sum()) > 0


def test_micro_batches_and_processes_share_the_pieces(rows: Rows) -> None:
    (whole,) = loader(rows).micro_batches(length=8)
    parts = loader(rows).micro_batches(1, 8)
    assert len(parts) == 4 and sum(part.n_targets for part in parts) == whole.n_targets
    ranks = [
        Loader(rows, 4, Packer(24), rank=rank, world=2).micro_batches(length=8)[0].n_targets
        for rank in (0, 1)
    ]
    assert sum(ranks) == whole.n_targets


def test_a_run_makes_the_stages_and_resumes_within_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = trainer_module.train_step

    def watched(*arguments: Any) -> Any:
        seen.append(max(batch.max_len for batch in arguments[3]))
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "train_step", watched)
    options: dict[str, Any] = {"steps": 8, "sequence_length_schedule": STAGES, "checkpoint_schedule": [3]}
    whole = runs.run(tmp_path / "whole", **options)
    # a length is rounded up to a power of two, so that a compiled model sees few shapes; 32 is the row's own
    assert [length <= limit for length, limit in zip(seen, [8, 8, 16, 16, 32, 32, 32, 32], strict=True)] == [
        True
    ] * 8
    assert seen[0] == 8 and seen[2] == 16 and max(seen) == 32
    plain = runs.run(tmp_path / "plain", steps=8)
    assert runs.losses(plain.run)[1] != runs.losses(whole.run)[1]
    config = runs.tiny(tmp_path / "whole", **{**options, "out": str(tmp_path / "again")})
    rest = train(config, resume=whole.run / "checkpoints" / "step-00000003", quiet=True)
    assert rest.checkpoint is not None and whole.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)
    assert runs.losses(rest.run) == {k: v for k, v in runs.losses(whole.run).items() if k > 3}
