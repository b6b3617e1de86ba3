"""Masked and labelled data through the same loop; what evaluation counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.errors import DataError
from plait.config.load import load_config
from plait.data.loader import without_targets
from plait.training import TrainResult, train
from plait.training.distributed import World
from plait.training.evaluate import evaluate
from plait.training.setup import Setup, set_up
from plait.training.step import train_step
from tests.training import runs

HERE = World(0, 1, torch.device("cpu"))


def masked(folder: Path, **training: Any) -> dict[str, Any]:
    model = {
        "pattern": "attention lstm",
        "causal": False,
        "head": "masked_lm",
        "lstm": {"bidirectional": True},
    }
    return runs.values(folder, objective="masked_lm", model=model, **training)


def test_masked_tokens_are_learnt(tmp_path: Path) -> None:
    for path in runs.corpus(tmp_path).iterdir():
        path.write_text("abcdefgh" * 30)
    config = load_config(masked(tmp_path, steps=60, lr=2e-2, eval_every=60, mlm_probability=0.3))
    result = train(config, quiet=True)
    assert result.validation is not None and result.validation.bits_per_byte is not None
    assert result.validation.bits_per_byte < 2.0
    assert result.validation.bits_per_byte == pytest.approx(result.validation.loss / math.log(2))


def test_masked_resumes_bit_for_bit(tmp_path: Path) -> None:
    runs.corpus(tmp_path)
    whole = train(load_config(masked(tmp_path, steps=4, checkpoint_every=2)), quiet=True)
    again = masked(tmp_path, steps=4, out=str(tmp_path / "again"))
    rest = train(load_config(again), resume=whole.run / "checkpoints" / "step-00000002", quiet=True)
    assert whole.checkpoint is not None and rest.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)


def labelled(folder: Path, labels: dict[str, Any], num_labels: int, **training: Any) -> TrainResult:
    """Texts that say their label in one word."""
    words = list(labels)
    records = [{"text": f"it is {words[i % len(words)]}" + "." * (i % 5)} for i in range(60)]
    for i, record in enumerate(records):
        record["label"] = labels[words[i % len(words)]]
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values = runs.values(
        folder,
        objective="classification",
        steps=80,
        lr=2e-2,
        model={
            "dropout": 0.0,
            "head": {"kind": "classification", "num_labels": num_labels, "pooling": "mean"},
        },
        data={"train": str(folder / "texts.jsonl")},
        **training,
    )
    return train(load_config(values), quiet=True)


def test_classes_are_learnt(tmp_path: Path) -> None:
    result = labelled(tmp_path, {"good": "yes", "bad": "no", "odd": "perhaps"}, 3)
    assert result.validation is not None
    assert result.validation.accuracy == 1.0 and result.validation.loss < 0.3
    assert result.validation.bits_per_byte is None
    assert 0 < result.validation.n_targets < 60


def test_numbers_are_learnt(tmp_path: Path) -> None:
    result = labelled(tmp_path, {"one": 1.0, "two": 2.0}, 1)
    assert result.validation is not None and result.validation.accuracy is None
    assert result.validation.loss < 0.1 < runs.losses(result.run)[1]


def test_a_batch_that_only_keeps_step_counts_for_nothing(tmp_path: Path) -> None:
    """What a process gets that has no row left; a regression's labels have no value that means none."""
    result = labelled(tmp_path, {"one": 1.0, "two": 2.0}, 1)
    config = load_config(result.run / "config.yaml")
    parts = set_up(config, tmp_path, None, HERE)
    batches = parts.batches(HERE)
    empty = without_targets(batches[0])
    n_targets = sum(batch.n_targets for batch in batches)
    found = []
    for given in (batches, [*batches, empty]):
        parts.optimizer.set_lr(0.0)
        arguments = parts.forward, parts.objective, parts.optimizer, given, n_targets
        update = train_step(*arguments, config.training, parts.scaler, HERE)
        gradients = torch.cat([gradient.flatten() for gradient in parts.optimizer.gradients()])
        evaluation = evaluate(
            parts.model, parts.forward, parts.objective, given, parts.token_bytes, config.training, HERE
        )
        found.append((update.loss, gradients, evaluation))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert torch.equal(found[0][1], found[1][1])


def test_too_few_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label 2 is not one of the classes"):
        labelled(tmp_path, {"good": "yes", "bad": "no", "odd": "perhaps"}, 2)


def parts_of(tmp_path: Path) -> Setup:
    return set_up(runs.tiny(tmp_path, eval_tokens=None), tmp_path, None, HERE)


def test_evaluation_counts_every_byte_once(tmp_path: Path) -> None:
    """Bits per byte over the held-out documents, against a plain loop over them."""
    parts = parts_of(tmp_path)
    long = parts.config.data.replace(
        sequence_length=4096
    )  # a row holds all of it: no token loses its context
    assert parts.validation is not None
    parts.objective.data = long
    batches = list(parts.evaluation(HERE))
    arguments = parts.objective, batches, parts.token_bytes, parts.config.training, HERE
    result = evaluate(parts.model, parts.forward, *arguments)
    nats, n_bytes, model = 0.0, 0, parts.model.eval()
    for number in range(parts.validation.n_documents):
        ids = torch.from_numpy(parts.validation.document(number))[None]
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss_sum)
        n_bytes += ids.shape[1] - 1  # all but its bos
    assert n_bytes == parts.validation.n_bytes == result.n_targets
    assert result.bits_per_byte == pytest.approx(nats / (math.log(2) * n_bytes), rel=1e-5)


def test_evaluation_leaves_the_model_training(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    parts.model.train()
    parts.model.blocks[1].eval()
    arguments = parts.objective, parts.evaluation(HERE), parts.token_bytes, parts.config.training, HERE
    evaluate(parts.model, parts.forward, *arguments)
    assert parts.model.training and not parts.model.blocks[1].training
    assert all(parameter.grad is None for parameter in parts.model.parameters())
