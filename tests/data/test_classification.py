"""Texts with labels: read from JSONL and Parquet, padded with a mask, classes in one order for both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plait.config.data import DataConfig
from plait.config.errors import DataError
from plait.data import TokenShards, open_data
from plait.data.classification import Examples, Padder
from plait.data.loader import Loader
from plait.tokenizers.bytes import BytesTokenizer

BYTES = BytesTokenizer()


def make(folder: Path, labels: list, more: str = "", **config) -> tuple[TokenShards, TokenShards | None]:
    rows = [json.dumps({"text": "x" * (i % 20 + 1), "label": label}) for i, label in enumerate(labels)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + more)
    settings = {"validation_fraction": 0.0, "cache": str(folder / "cache"), **config}
    return open_data(DataConfig(train=str(folder / "rows.jsonl"), **settings), BYTES, labels=True)


def test_padded_batches(tmp_path: Path) -> None:
    shard, _ = make(tmp_path, [0, 1, 2] * 10)
    examples = Examples(shard, 12, shuffle=False)
    batch = next(Loader(examples, 10, Padder(BYTES.pad_id, sequence_length=12)))
    assert batch.input_ids.shape == batch.attention_mask.shape == (10, 12)
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0] and batch.labels.dtype == torch.int64
    lengths = [i + 2 for i in range(10)]  # bos and i + 1 characters
    assert batch.attention_mask.sum(1).tolist() == lengths
    for ids, mask, length in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), lengths):
        assert ids == [BYTES.bos_id] + [ord("x")] * (length - 1) + [BYTES.pad_id] * (12 - length)
        assert mask == [1] * length + [0] * (12 - length)
    assert (batch.n_tokens, batch.n_targets) == (sum(lengths), 10)
    assert set(batch.inputs()) == {"input_ids", "labels", "attention_mask"}
    long = next(Loader(examples, 10, Padder(BYTES.pad_id, sequence_length=12), index=10))
    assert long.attention_mask.sum(1).tolist() == [12] * 10  # cut


def test_each_example_once_an_epoch(tmp_path: Path) -> None:
    shard, _ = make(tmp_path, [i / 8 for i in range(50)])
    examples = Examples(shard, 32, seed=1)
    epochs = [[float(examples.sample(e * 50 + i).labels[0]) for i in range(50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [i / 8 for i in range(50)]
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert all(len(examples.sample(i).tokens) == examples.sample(i).labels[0] * 8 % 20 + 2 for i in range(50))
    batch = Padder(regression=True)([examples.sample(0)])
    assert batch.labels.dtype == torch.float32


def test_names_of_classes_agree_between_the_sides(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "v", "label": "neutral"}\n{"text": "w", "label": "bad"}\n')
    train, held = make(tmp_path, ["good", "neutral", "bad"], validation=str(tmp_path / "held.jsonl"))
    assert train.classes == ["bad", "good", "neutral"]
    assert train.labels.tolist() == [1, 2, 0]
    assert held.labels.tolist() == [2, 0]
    (tmp_path / "held.jsonl").write_text('{"text": "v", "label": "ugly"}\n')
    with pytest.raises(DataError, match="label 'ugly' is none of the classes bad, good, neutral"):
        make(tmp_path, ["good", "neutral", "bad"], validation=str(tmp_path / "held.jsonl"))


def test_wrong_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all numbers or all names, got int, str"):
        make(tmp_path, [1, "a"])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: there is no field 'label'"):
        make(tmp_path, [1], '\n{"text": "x"}')
    shard, _ = make(tmp_path, [0, 1, 2])
    Examples(shard, 8).check_labels(3)
    Examples(shard, 8).check_labels(1)
    with pytest.raises(DataError, match=r"label 2 is not one of the classes 0 \.\. 1"):
        Examples(shard, 8).check_labels(2)
    for wrong in (-1, 0.5):
        shard, _ = make(tmp_path, [0, 1, wrong])
        with pytest.raises(DataError, match=rf"label {wrong} is not one of the classes"):
            Examples(shard, 8).check_labels(2)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="a text file has no labels"):
        open_data(DataConfig(train=str(tmp_path / "a.txt"), cache=str(tmp_path)), BYTES, labels=True)
    plain, _ = open_data(
        DataConfig(train=str(tmp_path / "a.txt"), cache=str(tmp_path), validation_fraction=0), BYTES
    )
    with pytest.raises(DataError, match="has no labels"):
        Examples(plain, 8)
