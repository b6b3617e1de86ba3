"""CORE while a run trains: when it is asked, what is asked, what is written, and that training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.errors import ConfigError, DataError
from plait.config.load import load_config
from plait.evaluation.core import evaluate_task, read_bundle
from plait.formats.native import load_model
from plait.inference.generate import evaluating
from plait.training import train
from plait.training.core import ask_tasks
from plait.training.distributed import World
from plait.training.metrics import read_metrics
from tests.training import runs

WORDS = ["quick", "brown", "fox", "lazy", "dog", "sleeps", "trees", "jumps", "under"]


def bundle(folder: Path, items: int = 9) -> Path:
    """Three tasks of bytes, one of each type; what is right is in the corpus of the runs, what is wrong is not."""
    tasks: dict[str, tuple[str, int, list[dict[str, Any]]]] = {
        "words": (
            "multiple_choice",
            1,
            [{"query": "the", "choices": ["@#%&", w], "gold": 1} for w in WORDS[:items]],
        ),
        "ends": (
            "schema",
            0,
            [
                {"context_options": [f"the {w}", "%%%"], "continuation": "and a dog.", "gold": 0}
                for w in WORDS[:items]
            ],
        ),
        "next": (
            "language_modeling",
            2,
            [{"context": f"the {w[:-1]}", "continuation": w[-1]} for w in WORDS[:items]],
        ),
    }
    folder = folder / "tasks"
    (folder / "eval_data").mkdir(parents=True)
    listed, chances = [], ["Eval Task,Random baseline"]
    for name, (kind, shots, entries) in tasks.items():
        (folder / "eval_data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
        listed.append(
            {"label": name, "dataset_uri": f"{name}.jsonl", "icl_task_type": kind, "num_fewshot": [shots]}
        )
        listed[-1]["continuation_delimiter"] = "" if kind == "language_modeling" else " "
        chances.append(f"{name},{0 if kind == 'language_modeling' else 50}")
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))
    (folder / "eval_meta_data.csv").write_text("\n".join(chances) + "\n")
    return folder


def config(folder: Path, name: str = "run", **training: Any) -> Any:
    values = runs.values(folder, **{"steps": 6, "checkpoint_every": 2, "out": str(folder / name), **training})
    values["training"]["keep_checkpoints"] = 9
    return load_config(values)


def core_lines(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == "core"]


def test_it_is_asked_every_so_many_steps_and_at_the_end(tmp_path: Path, capsys: Any) -> None:
    runs.corpus(tmp_path)
    folder = bundle(tmp_path)
    done = train(config(tmp_path, core_tasks=str(folder), core_every=2, core_max_per_task=4))
    lines = core_lines(done.run)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all({s["items"] for s in line["tasks"].values()} == {4} for line in lines)
    shown = capsys.readouterr().err
    for line in lines:
        checkpoint = load_model(done.run / "checkpoints" / f"step-{line['step']:08d}")
        scores = [evaluate_task(checkpoint, task, limit=4) for task in read_bundle(folder)]
        assert line["tasks"] == {
            s.name: {"accuracy": s.accuracy, "centered": s.centered, "items": 4} for s in scores
        }, "what was written is what the weights of that step answer"
        assert line["core"] == pytest.approx(sum(s.centered for s in scores) / 3)
        assert f"step {line['step']}: CORE {line['core']:.4f} (words " in shown
    assert done.core == lines[-1]["core"]
    assert lines[0]["tokens"] < lines[1]["tokens"] == 2 * lines[0]["tokens"]


def test_it_can_be_for_the_end_alone_and_off(tmp_path: Path) -> None:
    runs.corpus(tmp_path)
    folder = bundle(tmp_path)
    done = train(config(tmp_path, core_tasks=str(folder)), quiet=True)
    (line,) = core_lines(done.run)
    assert line["step"] == 6 and {s["items"] for s in line["tasks"].values()} == {9}
    done = train(config(tmp_path, "off"), quiet=True)
    assert core_lines(done.run) == [] and done.core is None


def test_training_does_not_notice_it_and_a_resumed_run_asks_on(tmp_path: Path) -> None:
    """The model has dropout: a random number more or less, or eval mode left on, would change what follows."""
    runs.corpus(tmp_path)
    folder = bundle(tmp_path)
    plain = train(config(tmp_path, "plain"), quiet=True)
    asked = train(config(tmp_path, "asked", core_tasks=str(folder), core_every=1), quiet=True)
    assert asked.checkpoint is not None and plain.checkpoint is not None
    assert runs.tensor_hashes(asked.checkpoint) == runs.tensor_hashes(plain.checkpoint)
    again = config(tmp_path, "again", core_tasks=str(folder), core_every=1)
    rest = train(again, resume=asked.run / "checkpoints" / "step-00000004", quiet=True)
    assert rest.checkpoint is not None
    assert runs.tensor_hashes(rest.checkpoint) == runs.tensor_hashes(plain.checkpoint)
    assert core_lines(rest.run)[-2:] == core_lines(asked.run)[-2:]


def test_several_processes_share_the_items(tmp_path: Path) -> None:
    """Each asks its part; the sums are what one process counts. 7 items do not divide by 3."""
    runs.corpus(tmp_path)
    folder = bundle(tmp_path)
    done = train(config(tmp_path, core_tasks=str(folder), core_max_per_task=7), quiet=True)
    settings = config(tmp_path, core_tasks=str(folder), core_max_per_task=7).training
    tasks = read_bundle(folder)

    held: list[list[float]] = []

    class Alone(World):
        """One of three processes, whose sums are its own."""

        def sums(self, values: Any) -> list[float]:
            held.append(list(values))
            return [*values[:3], 1.0, 1.0, 1.0]

    whole = ask_tasks(done.model, done.tokenizer, tasks, settings, World(0, 1, torch.device("cpu")))
    for rank in range(3):
        ask_tasks(done.model, done.tokenizer, tasks, settings, Alone(rank, 3, torch.device("cpu")))
    assert [counts[3:] for counts in held] == [[3] * 3, [2] * 3, [2] * 3]
    counted = [sum(column) for column in zip(*held, strict=True)]
    assert counted[3:] == [7, 7, 7]
    assert [count / 7 for count in counted[:3]] == [score.accuracy for score in whole]


def test_long_questions_in_bfloat16(tmp_path: Path) -> None:
    """Prompts longer than a piece of the evaluation go through the cache, also under autocast."""
    runs.corpus(tmp_path)
    folder = bundle(tmp_path, items=2)
    long = {"context": "the lazy dog and a brown fox. " * 60, "continuation": "the"}
    (folder / "eval_data" / "next.jsonl").write_text("\n".join([json.dumps(long)] * 2))
    done = train(config(tmp_path, core_tasks=str(folder), precision="bf16", steps=2), quiet=True)
    (line,) = core_lines(done.run)
    assert line["tasks"]["next"]["items"] == 2


def test_compiled_blocks_are_not_compiled_for_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.corpus(tmp_path)
    model = train(config(tmp_path), quiet=True).model
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph.forward

    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
    settings = config(tmp_path, core_tasks=str(bundle(tmp_path)), compile=True).training
    tasks = read_bundle(settings.core_tasks)
    scores = ask_tasks(model, model.tokenizer, tasks, settings, World(0, 1, torch.device("cpu")))
    assert len(scores) == 3 and calls == []
    with evaluating(model), torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64))
    assert calls, "they would have been"


@pytest.mark.parametrize(
    ("training", "complaint"),
    [
        ({"core_every": 5}, "training.core_tasks: core_every is 5, but no folder of CORE's tasks is named"),
        ({"core_tasks": "x", "objective": "masked_lm"}, "CORE asks causal language models, not masked_lm"),
        ({"core_tasks": "x", "core_max_per_task": 0}, "core_max_per_task: expected a whole number"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, training: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(runs.values(tmp_path, **training))


def test_a_folder_without_tasks_is_refused_before_training(tmp_path: Path) -> None:
    runs.corpus(tmp_path)
    with pytest.raises(DataError, match=r"nowhere/core\.yaml cannot be read"):
        train(config(tmp_path, core_tasks=str(tmp_path / "nowhere")), quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
