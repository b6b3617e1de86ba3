"""CORE: in-context tasks of three types, each against its chance level (DCLM, arXiv 2406.11794, as nanochat asks it).

    multiple_choice     one context, several continuations: which costs least a token?
    schema              several contexts, one continuation: after which does it cost least a token?
    language_modeling   one context, one continuation: is every token of it the likeliest?

A task is a JSONL file; its few-shot examples are other items of the same file, drawn by item, so that results do not
depend on the order of evaluation. The score of a task is centered, (accuracy - chance) / (1 - chance), and CORE is the
mean over the tasks.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from plait.config.errors import ConfigError, DataError
from plait.evaluation.losses import token_scores
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer

Kind = Literal["multiple_choice", "schema", "language_modeling"]
_KEYS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
_SHUFFLE, _SHOTS = 1337, 1234  # the seeds that nanochat takes, so that its results can be compared
_ITEMS_AT_ONCE = 64


@dataclass(frozen=True)
class CoreTask:
    """One task: its items, and how they are asked. ``chance`` is the accuracy of guessing, 0 to 1."""

    name: str
    kind: Kind
    items: list[dict[str, Any]]
    shots: int = 0
    delimiter: str = " "
    chance: float = 0.0


@dataclass(frozen=True)
class TaskScore:
    """How a task went."""

    name: str
    accuracy: float
    centered: float
    n_items: int


@dataclass(frozen=True)
class _Question:
    """What a model is asked of an item: rows of ids, the counted part of each, and which row is right."""

    rows: list[list[int]]
    parts: list[tuple[int, int]]
    gold: int


def core_score(scores: Sequence[TaskScore]) -> float:
    """The mean of the centered scores."""
    if not scores:
        raise DataError("no task was evaluated, so there is no CORE score")
    return sum(score.centered for score in scores) / len(scores)


def evaluate_task(
    model: Model, task: CoreTask, *, tokenizer: Tokenizer | None = None, limit: int | None = None
) -> TaskScore:
    """Ask a model a task's items, or ``limit`` of them, drawn the same each time."""
    right, asked = right_answers(model, task, tokenizer=tokenizer, limit=limit)
    return task_score(task, right, asked)


def right_answers(
    model: Model,
    task: CoreTask,
    *,
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[int, int]:
    """(right answers, items) of the items that ``evaluate_task`` asks, or of those of one process among ``world``.

    Every ``world``-th item from ``rank`` on: sums over the processes are what one process counts.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("CORE needs a tokenizer, and the model has none: give tokenizer=")
    items = list(task.items)
    random.Random(_SHUFFLE).shuffle(items)
    items = items[:limit]
    own = range(rank, len(items), world)
    right = 0
    for at in range(0, len(own), _ITEMS_AT_ONCE):
        questions = [_question(tokenizer, task, items, i) for i in own[at : at + _ITEMS_AT_ONCE]]
        right += sum(_answers(model, tokenizer, task.kind, questions))
    return right, len(own)


def task_score(task: CoreTask, right: int, asked: int) -> TaskScore:
    """The score of a task of whose ``asked`` items ``right`` were answered right."""
    accuracy = right / asked
    return TaskScore(task.name, accuracy, (accuracy - task.chance) / (1 - task.chance), asked)


def read_bundle(folder: str | Path) -> list[CoreTask]:
    """The tasks of a folder in nanochat's form: core.yaml, eval_meta_data.csv (chance levels) and eval_data/.

    DataError names the file and the entry that is wrong.
    """
    folder = Path(folder)
    try:
        listed = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with (folder / "eval_meta_data.csv").open(encoding="utf-8", newline="") as lines:
            chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(lines)}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder} is no bundle of CORE tasks: {error!r} in core.yaml or eval_meta_data.csv"
        ) from None
    tasks = []
    for entry in listed:
        try:
            name, file, kind = entry["label"], entry["dataset_uri"], entry["icl_task_type"]
            shots, delimiter = entry["num_fewshot"], entry.get("continuation_delimiter", " ")
        except (KeyError, TypeError):
            raise DataError(
                f"{folder / 'core.yaml'}: an entry needs label, dataset_uri, icl_task_type and num_fewshot; "
                f"got {entry!r}"
            ) from None
        if name not in chances:
            raise DataError(f"{folder / 'eval_meta_data.csv'} has no random baseline of {name!r}")
        few = shots[0] if isinstance(shots, list) else shots
        items = read_items(folder / "eval_data" / file, kind)
        tasks.append(CoreTask(name, cast(Kind, kind), items, int(few), delimiter, chances[name]))
    return tasks


def read_items(path: str | Path, kind: str) -> list[dict[str, Any]]:
    """The items of a JSONL file; DataError names the line that is not one of this kind of task."""
    if kind not in _KEYS:
        raise DataError(f"{kind!r} is no type of task; there are {', '.join(_KEYS)}")
    path, items = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            raise DataError(f"{path}, line {number}: not JSON: {line[:80]!r}") from None
        if not isinstance(item, dict) or any(key not in item for key in _KEYS[kind]):
            raise DataError(f"{path}, line {number}: a {kind} item needs {', '.join(_KEYS[kind])}")
        options = item.get("choices", item.get("context_options"))
        if options is not None and (
            not isinstance(item["gold"], int) or not 0 <= item["gold"] < len(options)
        ):
            raise DataError(
                f"{path}, line {number}: gold must be 0 to {len(options) - 1}; it is {item['gold']!r}"
            )
        items.append(item)
    if not items:
        raise DataError(f"{path} holds no items")
    return items


def prompts(task: CoreTask, item: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts that an item asks about, after its few-shot examples; of language_modeling: context, then whole."""
    gap = task.delimiter
    if task.kind == "multiple_choice":
        shown = [example["query"] + gap + example["choices"][example["gold"]] for example in examples]
        asked = [item["query"] + gap + choice for choice in item["choices"]]
    elif task.kind == "schema":
        shown = [e["context_options"][e["gold"]] + gap + e["continuation"] for e in examples]
        asked = [option + gap + item["continuation"] for option in item["context_options"]]
    else:
        shown = [example["context"].strip() + gap + example["continuation"] for example in examples]
        context = item["context"].strip()
        asked = [(context + gap).strip(), context + gap + item["continuation"]]
    return ["\n\n".join([*shown, text]) for text in asked]


def _question(tokenizer: Tokenizer, task: CoreTask, items: Sequence[dict[str, Any]], index: int) -> _Question:
    item = items[index]
    others = [i for i in range(len(items)) if i != index]
    chosen = random.Random(_SHOTS + index).sample(others, min(task.shots, len(others)))
    rows = [tokenizer.encode(text) for text in prompts(task, item, [items[i] for i in chosen])]
    if task.kind == "multiple_choice":
        common = _common(rows)
        return _Question(rows, [(common, len(row)) for row in rows], item["gold"])
    if task.kind == "schema":
        common = _common([row[::-1] for row in rows])
        return _Question(rows, [(len(row) - common, len(row)) for row in rows], item["gold"])
    context, whole = rows
    # a tokenizer may join the context's end with what follows: what differs belongs to the continuation
    return _Question([whole], [(_common([context, whole]), len(whole))], 0)


def _answers(model: Model, tokenizer: Tokenizer, kind: Kind, questions: Sequence[_Question]) -> list[bool]:
    longest = model.config.embedding.max_positions if model.config.embedding.position == "learned" else None
    rows, parts = [], []
    for question in questions:
        for row, (begin, end) in zip(question.rows, question.parts, strict=True):
            # too long for the model: the examples farthest back are forgotten, never the question
            skip = 0 if longest is None else max(0, len(row) + 1 - longest)
            rows.append(row[skip:])
            parts.append((max(0, begin - skip), end - skip))
    losses, hits = token_scores(model, rows, start=tokenizer.bos_id)
    answers, at = [], 0
    for question in questions:
        some = range(at, at + len(question.rows))
        at += len(question.rows)
        if kind == "language_modeling":
            begin, end = parts[some[0]]
            answers.append(bool(hits[some[0]][begin:end].all()))
        else:
            costs = [_mean(losses[i][parts[i][0] : parts[i][1]]) for i in some]
            answers.append(min(range(len(costs)), key=costs.__getitem__) == question.gold)
    return answers


def _mean(costs: Any) -> float:
    return float(costs.double().mean()) if len(costs) else float("inf")


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many ids at their beginning all rows share."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count
