"""CORE: what is asked, what counts as right, and the centered score, on items made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.errors import DataError
from plait.evaluation.core import (
    CoreTask,
    TaskScore,
    core_score,
    evaluate_task,
    prompts,
    read_bundle,
    read_items,
)
from plait.models import Model
from plait.tokenizers.bytes import BytesTokenizer
from tests.inference.helpers import make_model

CHOICES = [
    {"query": "Q: one", "choices": ["a", "bb", "ccc"], "gold": 1},
    {"query": "Q: two", "choices": ["x", "yy"], "gold": 0},
    {"query": "Q: three", "choices": ["d", "e"], "gold": 1},
]
SCHEMA = [
    {
        "context_options": ["Ann was late because Ann", "Ann was late because Bob"],
        "continuation": "overslept.",
        "gold": 0,
    },
    {"context_options": ["The cup", "The box"], "continuation": "is full.", "gold": 1},
]
LINES = [{"context": "the cat ", "continuation": "sat"}, {"context": "a dog", "continuation": "ran"}]


def made() -> Model:
    model = make_model("hybrid", vocab_size=BytesTokenizer().vocab_size)
    model.tokenizer = BytesTokenizer()
    return model


def costs(model: Model, prefix: str, counted: str) -> list[float]:
    """Nats of the bytes of ``counted`` after ``prefix``, one forward for each."""
    tokenizer = model.tokenizer
    ids, begin = tokenizer.encode(prefix + counted), len(tokenizer.encode(prefix))
    found = []
    with torch.no_grad():
        for at in range(begin, len(ids)):
            logits = model(torch.tensor([[tokenizer.bos_id, *ids[:at]]])).logits[0, -1].double()
            found.append(-float(logits.log_softmax(-1)[ids[at]]))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_what_is_asked() -> None:
    task = CoreTask("t", "multiple_choice", CHOICES, 1, "\nA: ")
    assert prompts(task, CHOICES[0], [CHOICES[1]]) == [
        f"Q: two\nA: x\n\nQ: one\nA: {c}" for c in ("a", "bb", "ccc")
    ]
    task = CoreTask("t", "schema", SCHEMA)
    assert prompts(task, SCHEMA[1], [SCHEMA[0]]) == [
        f"Ann was late because Ann overslept.\n\nThe {thing} is full." for thing in ("cup", "box")
    ]
    task = CoreTask("t", "language_modeling", LINES)
    assert prompts(task, LINES[0], [LINES[1]]) == ["a dog ran\n\nthe cat", "a dog ran\n\nthe cat sat"]


@pytest.mark.parametrize("gold", [0, 1, 2])
def test_multiple_choice_takes_the_least_cost_a_token_after_the_common_beginning(gold: int) -> None:
    model = made()
    item = CHOICES[0] | {"gold": gold}
    cost = [mean(costs(model, "Q: one ", choice)) for choice in CHOICES[0]["choices"]]
    right = min(range(3), key=cost.__getitem__)
    assert evaluate_task(model, CoreTask("t", "multiple_choice", [item])).accuracy == float(right == gold)


@pytest.mark.parametrize("gold", [0, 1])
def test_schema_compares_the_common_end(gold: int) -> None:
    """Common to the end are the bytes after the words that differ, the space before the continuation too."""
    model = made()
    item = {"context_options": ["The cup", "The vat"], "continuation": "is full.", "gold": gold}
    cost = [mean(costs(model, f"The {thing}", " is full.")) for thing in ("cup", "vat")]
    right = min(range(2), key=cost.__getitem__)
    assert evaluate_task(model, CoreTask("t", "schema", [item])).accuracy == float(right == gold)


def test_language_modeling_wants_every_token_likeliest() -> None:
    model = made()
    start = [model.tokenizer.bos_id, *model.tokenizer.encode("the cat")]
    with torch.no_grad():
        ids = list(start)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    likeliest = ids[len(start) :]
    head = model.get_parameter("head.unembedding.weight")
    assert head is not None

    def accuracy(continuation: str) -> float:
        item = {"context": "the cat", "continuation": continuation}
        return evaluate_task(model, CoreTask("t", "language_modeling", [item], delimiter="")).accuracy

    text = bytes(i for i in likeliest if i < 256).decode("latin-1")
    if all(i < 128 and not chr(i).isspace() for i in likeliest):
        assert accuracy(text) == 1.0
        assert accuracy(text[:-1] + ("a" if text[-1] != "a" else "b")) == 0.0
    assert accuracy("zqzq") == float(text == "zqzq")


def test_a_taught_model_answers() -> None:
    """The three types on a model that has learnt the items by heart, and on their opposites."""
    model = made().float()
    texts = ["Q: one bb", "Q: two x", "Q: three e", "the cat sat", "a dog ran", "The box is full."]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = [torch.tensor([[model.tokenizer.bos_id, *model.tokenizer.encode(text)]]) for text in texts]
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(row, labels=row).loss for row in ids).backward()  # type: ignore[union-attr]
        optimizer.step()
    model.eval()
    assert evaluate_task(model, CoreTask("mc", "multiple_choice", CHOICES)).accuracy == 1.0
    assert evaluate_task(model, CoreTask("lm", "language_modeling", LINES)).accuracy == 1.0
    opposite = [item | {"gold": 0 if item["gold"] else 1} for item in CHOICES]
    assert evaluate_task(model, CoreTask("mc", "multiple_choice", opposite)).accuracy == 0.0
    wrong = [item | {"continuation": "flew"} for item in LINES]
    assert evaluate_task(model, CoreTask("lm", "language_modeling", wrong)).accuracy == 0.0


def test_scores_are_centered_on_chance() -> None:
    model = made()
    item = CHOICES[0]
    right = next(
        g
        for g in range(3)
        if evaluate_task(model, CoreTask("t", "multiple_choice", [item | {"gold": g}])).accuracy
    )
    score = evaluate_task(model, CoreTask("t", "multiple_choice", [item | {"gold": right}], chance=0.25))
    assert score.centered == 1.0
    wrong = evaluate_task(
        model, CoreTask("t", "multiple_choice", [item | {"gold": (right + 1) % 3}], chance=0.25)
    )
    assert wrong.centered == pytest.approx(-1 / 3)
    assert core_score([score, wrong]) == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="no task"):
        core_score([])
    assert core_score([TaskScore("a", 0.5, 0.25, 4)]) == 0.25


def bundle(folder: Path, **changes: Any) -> Path:
    (folder / "eval_data").mkdir(parents=True)
    entry = {
        "label": "choices", "dataset_uri": "choices.jsonl", "icl_task_type": "multiple_choice",
        "num_fewshot": [2], "continuation_delimiter": "\nA: ",
    }  # fmt: skip
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [entry | changes]}))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoices,40\n")
    (folder / "eval_data" / "choices.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    return folder


def test_a_bundle_of_local_files(tmp_path: Path) -> None:
    (task,) = read_bundle(bundle(tmp_path / "a"))
    assert task == CoreTask("choices", "multiple_choice", CHOICES, 2, "\nA: ", 0.4)
    score = evaluate_task(made(), task, limit=2)
    assert score.n_items == 2 and score.centered == pytest.approx((score.accuracy - 0.4) / 0.6)
    with pytest.raises(DataError, match="no random baseline of 'other'"):
        read_bundle(bundle(tmp_path / "b", label="other"))
    with pytest.raises(DataError, match="'poem' is no type of task"):
        read_bundle(bundle(tmp_path / "c", icl_task_type="poem"))
    with pytest.raises(DataError, match="cannot be read"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 1: not JSON"),
        ('{"query": "a"}', "needs query, choices, gold"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "gold must be 0 to 0"),
        ("", "holds no items"),
    ],
)
def test_wrong_items_are_named(tmp_path: Path, line: str, error: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=error):
        read_items(path, "multiple_choice")
