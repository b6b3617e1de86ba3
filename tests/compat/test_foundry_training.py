"""Model Foundry's collators and Trainer: batches, the one trainer underneath, log files."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.compat.foundry.config import ExperimentConfig
from plait.compat.foundry.data_collators import (
    CausalLMDataCollator,
    MaskedLMDataCollator,
    get_data_collator,
)
from plait.compat.foundry.logging_utils import close_logging, setup_logging
from plait.compat.foundry.metadata import checkpoint_metadata
from plait.compat.foundry.trainer import Trainer
from plait.config.load import load_config
from plait.formats.manifest import verify_manifest
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.sentencepiece import SentencePieceTokenizer
from plait.training.checkpoint import RunState, read_state
from tests.compat.foundry_models import CLASSES, MAMBA, V, architectures, drawn, experiment, shrunk, tokens


@pytest.fixture(autouse=True)
def _on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- collators -------------------------------------------------------------------------------------------------------


class TheirTokenizer:
    """What Hugging Face's tokenizers offer to a collator."""

    pad_token_id, mask_token_id, cls_token_id, sep_token_id, unk_token_id = 0, 1, 2, 3, 4

    def __len__(self) -> int:
        return 400


def examples(*lengths: int, low: int = 5, high: int = 400) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(low, high, (n,), generator=g).tolist()} for n in lengths]


def test_causal_collator() -> None:
    given = examples(3, 11, 9)
    batch = CausalLMDataCollator(TheirTokenizer())(given)
    assert all(tensor.shape == (3, 16) and tensor.dtype == torch.int64 for tensor in batch.values())
    for row, example in enumerate(given):
        n = len(example["input_ids"])
        assert batch["input_ids"][row].tolist() == example["input_ids"] + [0] * (16 - n)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (16 - n)
        assert batch["labels"][row].tolist() == example["input_ids"] + [-100] * (16 - n)
    assert CausalLMDataCollator(TheirTokenizer(), pad_to_multiple_of=None)(given)["labels"].shape == (3, 11)


def test_the_causal_batch_trains_mamba() -> None:
    """Through the loss the pads count for nothing, and each row predicts its own next tokens."""
    model = drawn()
    given = examples(3, 9, low=0, high=V)
    batch = CausalLMDataCollator(BytesTokenizer(), pad_to_multiple_of=8)(given)
    batch["input_ids"][batch["attention_mask"] == 0] = V - 1  # whatever stands there
    with torch.no_grad():
        loss = model(**batch).loss
        sums = []
        for example in given:
            ids = torch.tensor([example["input_ids"]])
            logits = model(ids).logits[0, :-1]
            sums.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert abs(float(loss - sum(sums) / (2 + 8))) < 1e-5


def test_masked_collator() -> None:
    torch.manual_seed(0)
    given = [{"input_ids": [2, *example["input_ids"], 3]} for example in examples(*[1998] * 20)]
    batch = MaskedLMDataCollator(TheirTokenizer(), mlm_probability=0.15)([*given, {"input_ids": [7]}])
    truth = CausalLMDataCollator(TheirTokenizer())([*given, {"input_ids": [7]}])
    ids, labels, real = truth["input_ids"], batch["labels"], truth["attention_mask"].bool()
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and not bool((chosen & ~real).any())
    assert not bool((chosen & ((ids == 2) | (ids == 3))).any()), "special tokens are never predicted"
    shown = batch["input_ids"]
    assert torch.equal(shown[~chosen], ids[~chosen])
    ordinary = int((real & (ids > 4)).sum())
    share = float(chosen.sum()) / ordinary
    masked = float((shown[chosen] == 1).float().mean())
    same = float((shown[chosen] == ids[chosen]).float().mean())
    # three standard deviations and a little: the numbers are those of 40 000 tokens
    assert abs(share - 0.15) < 0.006 and abs(masked - 0.8) < 0.017 and abs(same - 0.1) < 0.014
    random = shown[chosen & (shown != 1) & (shown != ids)]
    assert int(random.min()) > 4 and int(random.max()) < 400 and len(random.unique()) > 200


def test_masked_collator_of_plaits_tokenizers() -> None:
    tokenizer = BytesTokenizer()
    batch = MaskedLMDataCollator(tokenizer, mlm_probability=0.9)(examples(300, high=256))
    chosen = batch["labels"] != -100
    assert bool(chosen.any()) and bool((batch["input_ids"][chosen] == tokenizer.mask_id).any())
    assert batch["labels"].shape == (1, 304) and batch["input_ids"][0, 300] == tokenizer.pad_id
    plain = MaskedLMDataCollator(tokenizer, mlm=False)(examples(3, high=256))
    assert (
        plain["labels"].tolist() == CausalLMDataCollator(tokenizer)(examples(3, high=256))["labels"].tolist()
    )
    with pytest.raises(ValueError, match="objective"):
        get_data_collator(type("C", (), {"training": type("T", (), {"objective": "seq2seq"})}), tokenizer)


def test_the_collator_of_an_experiment() -> None:
    causal = get_data_collator(experiment("mamba"), TheirTokenizer())
    assert isinstance(causal, CausalLMDataCollator) and causal.mlm is False and causal.pad_to_multiple_of == 8
    training = {"objective": "masked_lm", "mlm_probability": 0.3}
    masked = get_data_collator(experiment("bert", training=training), TheirTokenizer())
    assert isinstance(masked, MaskedLMDataCollator) and masked.mlm_probability == 0.3


def test_the_pad_of_sentencepiece_is_not_its_unknown_token() -> None:
    texts = ["the quick brown fox jumps over the lazy dog"] * 3
    tokenizer = SentencePieceTokenizer.train(texts, 300)
    batch = CausalLMDataCollator(tokenizer)([{"input_ids": tokenizer.encode("the fox")}])
    assert tokenizer.unk_id == 0 and tokenizer.pad_id == 3
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {3}


# --- training -------------------------------------------------------------------------------------------------------


@architectures
def test_every_architecture_trains(architecture: str, tmp_path: Path) -> None:
    """Through the one trainer: the loss falls well below that of guessing; checkpoints are written, and load."""
    config = shrunk(tmp_path, architecture, train_steps=80, checkpoint_schedule=[10, 80])
    trainer = Trainer(config, tmp_path)
    result = trainer.train()
    assert result.run == tmp_path / "out" and trainer.global_step == 80
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 80
    guessing = math.log(trainer.tokenizer.vocab_size)
    assert abs(losses[0] - guessing) < 0.5
    # masked positions are few, so a step is a noisier view of the loss
    assert sum(losses[-5:]) / 5 < (0.95 if architecture == "bert" else 0.85) * guessing
    assert sorted(p.name for p in (result.run / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000080",
    ]
    model = trainer.model
    assert type(model) is CLASSES[architecture]
    ids = tokens(vocab=20)
    with torch.no_grad():
        assert torch.equal(CLASSES[architecture].from_pretrained(result.run)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("architecture", ["mamba", "gpt2"])
def test_each_checkpoint_has_foundrys_metadata(architecture: str, tmp_path: Path) -> None:
    """What Foundry's users read of a checkpoint: the tokens so far, by which they compare architectures."""
    config = shrunk(tmp_path, architecture, train_steps=5, checkpoint_schedule=[2, 5])
    result = Trainer(config, tmp_path).train()
    found = {}
    for step in (2, 5):
        folder = result.run / "checkpoints" / f"step-{step:08d}"
        verify_manifest(folder)
        found[step] = json.loads((folder / "metadata.json").read_text())
        assert found[step]["token_metrics"]["total_tokens_processed"] == read_state(folder).tokens
    late, batch = found[5], load_config(result.run / "config.yaml").training.batch_tokens
    assert (late["experiment_name"], late["global_step"]) == (config.experiment_name, 5)
    metrics = late["token_metrics"]
    assert metrics["tokens_per_step"] == batch and metrics["estimated_tokens_at_step"] == 5 * batch
    assert (
        metrics["total_tokens_processed"]
        == result.tokens
        > found[2]["token_metrics"]["total_tokens_processed"]
    )
    assert metrics["effective_batch_size"] * metrics["sequence_length"] == batch
    transformer = architecture == "gpt2"
    assert late["model_config"] == {
        "architecture": architecture,
        "layers": 2,
        "hidden_size": config.model.hidden_size,
        "attention_heads": config.model.attention_heads if transformer else None,
    }
    assert late["training_config"]["learning_rate"] == config.training.learning_rate
    assert late["training_config"]["batch_size"] == config.batch_size
    assert found[2]["config_hash"] == late["config_hash"] and len(late["config_hash"]) == 32
    other = config.replace(random_seed=7)
    again = checkpoint_metadata(other, Trainer(other, tmp_path).run, RunState(), 10)
    assert again["config_hash"] != late["config_hash"] and again["epoch"] == 0
    counts = [
        checkpoint_metadata(other, Trainer(other, tmp_path).run, RunState(sample=n), 10)
        for n in (10, 11, 20, 21)
    ]
    assert [each["epoch"] for each in counts] == [0, 1, 1, 2]


def test_training_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        trainer = Trainer(shrunk(folder, "mamba", train_steps=3), folder)
        trainer.train()
        found.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_is_not_written_over_and_goes_on_when_asked(tmp_path: Path) -> None:
    Trainer(shrunk(tmp_path, "mamba", train_steps=3), tmp_path).train()
    again = shrunk(tmp_path, "mamba", train_steps=5)
    with pytest.raises(plait.PlaitError, match="already holds a run"):
        Trainer(again, tmp_path).train()
    resumed = again.replace(training=again.training.replace(resume_from_checkpoint=True))
    trainer = Trainer(resumed, tmp_path)
    assert trainer.model is None and trainer.tokenizer is None and trainer.global_step == 0
    assert trainer.train().step == 5
    log = (tmp_path / "logs" / "test_mamba" / "trainer.log").read_text().splitlines()
    messages = [json.loads(line)["message"] for line in log]
    assert any("already holds a run" in line for line in messages)
    assert any(line.startswith("Ended by steps at step 5") for line in messages)


def test_log_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ExperimentConfig(**{"model": {"architecture": "mamba", "mamba": MAMBA}}).logging.replace(
        use_structured_logging=False, file_level="WARNING", max_log_files=2
    )
    logger = setup_logging("trainer", "exp", tmp_path, logging.ERROR, config)
    try:
        logger.info("nobody reads this")
        logger.warning("%d tokens", 7)
        logger.error("wrong")
    finally:
        close_logging(logger)
    text = (tmp_path / "exp" / "trainer.log").read_text()
    assert "7 tokens" in text and "wrong" in text and "nobody" not in text
    shown = capsys.readouterr().err
    assert "wrong" in shown and "7 tokens" not in shown
