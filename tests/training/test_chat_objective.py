"""Learning conversations: over what the loss is, from which weights it begins, that it resumes, that it answers."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.errors import CheckpointError, ConfigError, TrainingError
from plait.config.load import load_config
from plait.config.schema import Config
from plait.data.batch import IGNORED
from plait.formats.native import load_model
from plait.inference.chat import ChatEngine
from plait.tokenizers import load_tokenizer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.chat import CHAT_TOKENS, ChatTemplate, with_chat_tokens
from plait.training import TrainResult, train
from plait.training.distributed import World
from plait.training.evaluate import evaluate
from plait.training.objectives import target_bytes
from plait.training.setup import Setup, set_up
from tests.invariants import redraw
from tests.training import runs

HERE = World(0, 1, torch.device("cpu"))
TEMPLATE = ChatTemplate(with_chat_tokens(BytesTokenizer()))
TALKS: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": "who are you?"},
        {"role": "assistant", "content": "a plait"},
        {"role": "user", "content": "really?"},
        {"role": "assistant", "content": "yes!"},
    ],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "6*7?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "it is "},
                {"type": "python", "text": "6*7"},
                {"type": "python_output", "text": "42"},
                {"type": "text", "text": "."},
            ],
        },
    ],
]


def values(folder: Path, talks: list[Any] | None = None, **training: Any) -> dict[str, Any]:
    """A run of the tiny hybrid on conversations."""
    path = folder / "chat.jsonl"
    lines = TALKS * 10 if talks is None else talks
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in lines))
    data = {"train": str(path), "sequence_length": 64, "validation_fraction": 0.3, **training.pop("data", {})}
    given = {"objective": "chat", "data": data, "batch_tokens": 192, "micro_batch_tokens": 128, **training}
    return runs.values(folder, **given)


def parts_of(folder: Path, **training: Any) -> Setup:
    return set_up(load_config(values(folder, **training)), folder, None, HERE)


def test_two_conversations_are_learnt_and_answered(tmp_path: Path) -> None:
    """To the letter, with the call of the calculator, whose output was never learnt."""
    model = {
        "d_model": 32,
        "pattern": "mamba2 attention",
        "dropout": 0.0,
        "mamba2": {"d_state": 16, "headdim": 16},
    }
    data = {"validation": str(tmp_path / "chat.jsonl"), "sequence_length": 128}
    result = train(
        load_config(
            values(
                tmp_path,
                TALKS,
                steps=80,
                batch_tokens=256,
                micro_batch_tokens=None,
                lr=2e-2,
                model=model,
                data=data,
            )
        ),
        quiet=True,
    )
    assert result.validation is not None and result.validation.loss < 0.05
    engine = ChatEngine(load_model(result.run))
    assert engine.reply(TALKS[0][:1], temperature=0) == TALKS[0][1]
    assert engine.reply(TALKS[0][:3], temperature=0) == TALKS[0][3]
    assert engine.reply(TALKS[1][:2], temperature=0) == TALKS[1][2]


def test_only_what_the_assistant_says_has_a_loss(tmp_path: Path) -> None:
    """The gradient of the logits is 0 wherever the next token is not the assistant's."""
    parts = parts_of(tmp_path)
    redraw(parts.model)
    parts.model.eval()
    batch = parts.batches(HERE)[0]
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.tolist()
    out = parts.objective.run(parts.forward, batch)
    assert out.logits is not None and out.loss_sum is not None
    [gradient] = torch.autograd.grad(out.loss_sum, out.logits)
    learnt = gradient[0].abs().sum(-1) > 0
    expected, nats = torch.zeros(len(ids), dtype=torch.bool), 0.0
    log_p = out.logits[0].detach().log_softmax(-1)
    for a, b in pairwise(bounds):
        mask = TEMPLATE.render(TEMPLATE.parse(ids[a:b])).mask if a < b else []
        for place, bit in enumerate(mask):
            assert labels[a + place] == (ids[a + place] if bit else IGNORED)
            if bit:
                expected[a + place - 1] = True
                nats -= float(log_p[a + place - 1, ids[a + place]])
    assert torch.equal(learnt, expected) and 0 < int(expected.sum()) == batch.n_targets < len(ids)
    assert float(out.loss_sum.detach()) == pytest.approx(nats, rel=1e-5)


def test_conversations_of_a_row_do_not_see_each_other(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, data={"sequence_length": 128}, micro_batch_tokens=None)
    redraw(parts.model)
    parts.model.eval()
    batch = parts.batches(HERE)[0]
    assert batch.cu_seqlens is not None
    bounds = sorted(set(batch.cu_seqlens.tolist()))
    assert len(bounds) > 3
    with torch.no_grad():
        whole = float(parts.objective.run(parts.forward, batch).loss_sum)  # type: ignore[arg-type]
        alone = [
            float(parts.model(batch.input_ids[:, a:b], labels=batch.labels[:, a:b]).loss_sum)
            for a, b in pairwise(bounds)
        ]
    assert sum(alone) == pytest.approx(whole, rel=1e-5)


def test_held_out_conversations_are_evaluated_once_each(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, eval_tokens=None)
    assert parts.validation is not None and 1 < parts.validation.n_documents < 20
    arguments = parts.token_bytes, parts.config.training, HERE
    result = evaluate(parts.model, parts.forward, parts.objective, parts.evaluation(HERE), *arguments)
    nats, n_targets, n_bytes = 0.0, 0, 0
    model = parts.model.eval()
    for number in range(parts.validation.n_documents):
        ids, mask = TEMPLATE.render(TEMPLATE.parse(parts.validation.document(number).tolist()))
        labels = [token if bit else IGNORED for token, bit in zip(ids, mask, strict=True)]
        with torch.no_grad():
            nats += float(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss_sum)
        n_targets += sum(mask)
        n_bytes += sum(token < 256 for token in labels if token != IGNORED)
    assert result.n_targets == n_targets and result.loss == pytest.approx(nats / n_targets, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / (0.6931471805599453 * n_bytes), rel=1e-5)
    ranks = [list(parts.objective.evaluation(parts.validation, 2, rank, 2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) > 0
    assert sum(batch.n_targets for batches in ranks for batch in batches) == n_targets
    parts.objective.training = parts.config.training.replace(eval_tokens=64)
    some = sum(batch.n_targets for batch in parts.evaluation(HERE))
    assert 0 < some < n_targets
    assert (
        sum(target_bytes(parts.objective, batch, parts.token_bytes) for batch in parts.evaluation(HERE))
        < n_bytes
    )


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = train(load_config(values(tmp_path, steps=5, checkpoint_every=3)), quiet=True)
    again = values(tmp_path, steps=5, out=str(tmp_path / "again"))
    rest = train(load_config(again), resume=whole.run / "checkpoints" / "step-00000003", quiet=True)
    assert whole.checkpoint is not None and rest.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)
    assert runs.losses(rest.run) == {step: loss for step, loss in runs.losses(whole.run).items() if step > 3}


def pretrained(folder: Path, **more: Any) -> TrainResult:
    """A model of plain text, without chat tokens."""
    runs.corpus(folder)
    base = runs.values(folder, steps=2, out=str(folder / "base"), **more)
    return train(load_config(base), quiet=True)


def tuned(folder: Path, base: TrainResult | Path, **more: Any) -> dict[str, Any]:
    path = base if isinstance(base, Path) else base.run
    config = values(folder, init_from=str(path), **more)
    del config["model"]  # the saved model's is taken over
    return config


def test_fine_tuning_begins_with_the_saved_weights_and_new_chat_tokens(tmp_path: Path) -> None:
    base = pretrained(tmp_path)
    assert base.checkpoint is not None
    parts = set_up(load_config(tuned(tmp_path, base)), tmp_path, None, HERE)
    old, new = load_model(base.checkpoint), parts.model
    assert parts.tokenizer.fingerprint() == TEMPLATE.tokenizer.fingerprint()
    assert new.vocab_size == 268 and old.vocab_size == 260
    for name, tensor in old.state_dict().items():
        found = new.state_dict()[name]
        assert torch.equal(found[: len(tensor)] if found.shape != tensor.shape else found, tensor), name
    rows = new.embedding.tokens.weight[260:]
    assert len(rows) == len(CHAT_TOKENS) and bool((rows.std(-1) > 0).all())
    assert parts.state.step == 0
    again = set_up(load_config(tuned(tmp_path, base)), tmp_path, None, HERE)
    assert torch.equal(again.model.embedding.tokens.weight, new.embedding.tokens.weight)


def test_the_saved_config_of_fine_tuning_runs_it_again(tmp_path: Path) -> None:
    base = pretrained(tmp_path)
    first = train(load_config(tuned(tmp_path, base, steps=3)), quiet=True)
    config = load_config(first.run / "config.yaml")
    assert config.training.init_from == str(base.checkpoint) and config.tokenizer.path is not None
    assert config.model.d_model == 16 and config.model.vocab_size == 268
    second = train(config.replace(training=config.training.replace(out=str(tmp_path / "second"))), quiet=True)
    assert runs.losses(second.run) == runs.losses(first.run)
    weights = [run.checkpoint / "model.safetensors" for run in (first, second) if run.checkpoint is not None]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_tuned_run_resumes_without_the_model_it_began_with(tmp_path: Path) -> None:
    base = pretrained(tmp_path)
    config = tuned(tmp_path, base, steps=4, checkpoint_every=2)
    whole = train(load_config(config), quiet=True)
    shutil.rmtree(base.run)
    half = whole.run / "checkpoints" / "step-00000002"
    rest = train(
        load_config({**config, "training": {**config["training"], "out": str(tmp_path / "rest")}}),
        resume=half,
        quiet=True,
    )
    assert whole.checkpoint is not None and rest.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(whole.checkpoint)
    kept = load_config(rest.run / "config.yaml")
    assert kept.model.d_model == 16 and kept.training.init_from == str(base.checkpoint)
    with pytest.raises(CheckpointError, match=r"training\.init_from: there is no folder"):
        train(load_config(tuned(tmp_path, base, out=str(tmp_path / "third"))), quiet=True)


def test_fine_tuning_on_plain_text_keeps_the_vocabulary(tmp_path: Path) -> None:
    base = pretrained(tmp_path)
    assert base.checkpoint is not None
    config = tuned(tmp_path, base, objective="causal_lm", data={"train": str(tmp_path / "corpus")})
    parts = set_up(load_config(config), tmp_path, None, HERE)
    old = load_model(base.checkpoint).state_dict()
    assert parts.model.vocab_size == 260
    assert all(torch.equal(old[name], tensor) for name, tensor in parts.model.state_dict().items())


def test_a_tokenizer_with_its_own_ids_is_taken_over_with_the_model(tmp_path: Path) -> None:
    base = pretrained(tmp_path)
    path = base.checkpoint
    assert path is not None
    runs_config = {"tokenizer": {"type": "bpe", "vocab_size": 270}}
    corpus = runs.values(tmp_path, steps=1, out=str(tmp_path / "bpe"))
    bpe = train(load_config({**corpus, **runs_config}), quiet=True)
    parts = set_up(load_config(tuned(tmp_path, bpe)), tmp_path, None, HERE)
    own = load_tokenizer(bpe.checkpoint / "tokenizer") if bpe.checkpoint is not None else None
    assert own is not None and parts.tokenizer.encode("the fox") == own.encode("the fox")
    assert parts.tokenizer.vocab_size == own.vocab_size + 8 == parts.model.vocab_size
    other = {**tuned(tmp_path, bpe), "tokenizer": {"type": "bytes", "chat": True}}
    with pytest.raises(TrainingError, match="reads the ids of its own bpe tokenizer"):
        set_up(load_config(other), tmp_path, None, HERE)
    same = {**tuned(tmp_path, base), "tokenizer": {"type": "bytes", "chat": True}}
    assert set_up(load_config(same), tmp_path, None, HERE).model.vocab_size == 268


def test_another_model_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    base = pretrained(tmp_path)
    config = values(tmp_path, init_from=str(base.run), model={"d_model": 32})
    with pytest.raises(
        TrainingError, match=r"model\.d_model is 16 there and 32 here; leave the section model out"
    ):
        set_up(load_config(config), tmp_path, None, HERE)
    agreeing = values(tmp_path, init_from=str(base.run))
    assert set_up(load_config(agreeing), tmp_path, None, HERE).model.vocab_size == 268
    with pytest.raises(CheckpointError, match=r"training\.init_from: .* holds no model"):
        set_up(
            load_config({**config, "training": {**config["training"], "init_from": str(tmp_path)}}),
            tmp_path,
            None,
            HERE,
        )


def test_what_does_not_fit_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"data\.documents: joined would let conversations see each other"
    ):
        parts_of(tmp_path, data={"documents": "joined"})
    with pytest.raises(ConfigError, match="chat reads whole texts"):
        load_config(values(tmp_path, sequence_length_schedule=[{"until": 0.5, "length": 16}]))
    with pytest.raises(TrainingError, match="needs a model with a lm head"):
        parts_of(tmp_path, model={"head": {"kind": "classification"}})


def test_a_tokenizer_is_trained_on_conversations(tmp_path: Path) -> None:
    config = values(tmp_path, steps=1)
    result = train(load_config({**config, "tokenizer": {"type": "bpe", "vocab_size": 280}}), quiet=True)
    assert set(CHAT_TOKENS) <= result.tokenizer.special_tokens.keys() and result.tokenizer.vocab_size <= 280
    ChatEngine(result.model)


def test_samples_are_answers(tmp_path: Path) -> None:
    result = train(
        load_config(
            values(tmp_path, steps=2, sample_every=1, sample_prompts=["hi", "6*7?"], sample_tokens=5)
        ),
        quiet=True,
    )
    text = (result.run / "samples" / "step-00000001.txt").read_text()
    assert text.startswith("hi\n") and "\n---\n\n6*7?\n" in text


def test_the_default_config_takes_part_in_nothing_of_this() -> None:
    assert Config().training.init_from is None and not Config().tokenizer.chat
