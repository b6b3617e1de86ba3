"""The way from text to a model that writes, as one types it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from plait import api
from plait.formats.folders import list_checkpoints
from tests.cli.conftest import TINY, Ran, Run


def names(folder: Path) -> set[str]:
    return {path.name for path in list_checkpoints(folder)}


def test_train_shows_the_run_and_its_next_commands_work(plait: Run, corpus: Path) -> None:
    ran = plait("train", *TINY, "--data.train", corpus, "--training.steps", "3", "--experiment-name=my run")
    assert ran.status == 0, ran
    for words in (
        "runs/my run",
        "text.txt; rows of 32 tokens",
        "bytes, 260 ids",
        "3 steps",
        "mamba2",
        "attention",
    ):
        assert words in ran.out, words
    assert ran.out.index("mamba2") < ran.out.index("next:")
    assert "step 3/3" in ran.err and "bits per byte" in ran.out
    commands = [
        shlex.split(line.split("#")[0]) for line in ran.out.splitlines() if line.startswith("  plait ")
    ]
    assert [command[1] for command in commands] == ["generate", "train", "plot"]
    wrote, more, drawn = [plait(*command[1:]) for command in commands]
    assert wrote.status == more.status == drawn.status == 0, (wrote, more, drawn)
    assert names(Path("runs/my run")) == {"step-00000003", "step-00000006"}
    assert "resumed at step 3" in more.err
    assert Path("runs/my run/loss.png").stat().st_size > 1000


def test_resume_is_the_same_as_never_stopping(plait: Run, corpus: Path) -> None:
    words = (
        f"--data.train={corpus}",
        "--training.steps=4",
        "--training.checkpoint_every=2",
        "--training.seed=5",
    )
    ran = plait("train", *TINY, *words, "--training.out=whole", "--model.dropout=0.1")
    assert ran.status == 0, ran
    ran = plait("train", "--resume", "whole/checkpoints/step-00000002", "--training.out=rest")
    assert ran.status == 0 and "resumed at step 2" in ran.err, ran
    a, b = (api.load(folder).state_dict() for folder in ("whole", "rest"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    before = api.load("whole/checkpoints/step-00000002").state_dict()
    assert not any(torch.equal(a[name], before[name]) for name in a)


def test_resume_by_itself_means_the_run_of_the_config(plait: Run, corpus: Path) -> None:
    Path("c.yaml").write_text("experiment_name: c\n")
    words = ("train", "c.yaml", *TINY, f"--data.train={corpus}")
    for steps, resume in (
        (1, ["--resume"]),
        (2, ["--resume"]),
        (3, ["--resume", "auto"]),
        (4, ["--resume=runs/c"]),
    ):
        ran = plait(*words, *resume, f"--training.steps={steps}")
        assert ran.status == 0, ran
        assert ("resumed at step" in ran.err) == (steps > 1)
    assert names(Path("runs/c")) == {"step-00000003", "step-00000004"}


def test_resume_of_a_folder_alone(plait: Run, trained: Path) -> None:
    ran = plait("train", "--resume", trained, "--training.steps=3")
    assert ran.status == 0, ran
    assert "resumed at step 2" in ran.err and "step-00000003" in names(trained)
    earlier = trained / "checkpoints" / "step-00000003"
    ran = plait("train", "--resume", earlier, "--training.steps=4")
    assert ran.status == 0 and "step-00000004" in names(trained)


def test_dry_run_writes_nothing(plait: Run, tmp_path: Path) -> None:
    ran = plait("train", "tiny", "--dry-run", "--training.steps=7")
    assert ran.status == 0, ran
    for words in ("memory", "optimizer", "FLOPs a step, 7 steps", "time", "dry run"):
        assert words in ran.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no config is given"),
        (["--resume"], "plait train --resume runs/NAME"),
        (["--resume", "runs/none"], "there is no runs/none"),
        (["--resume", "c.yaml"], "plait train c.yaml --resume"),
        (["tyni"], "neither a file nor a recipe"),
        (["tiny"], "data.train: no text is named"),
        (["tiny", "--data.train=x", "--steps=5"], "did you mean 'training.steps'?"),
        (["tiny", "--training.lr=fast"], "training.lr: expected a number"),
        (["tiny", "--training.device=tpu", "--data.train=c.yaml"], "'tpu' is no device"),
    ],
)
def test_what_cannot_be_trained(plait: Run, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "c.yaml").write_text("experiment_name: c\n")
    ran = plait("train", *words)
    assert ran.status == 1 and said in ran.error
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_run_is_never_written_over_unless_asked(plait: Run, trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    ran = plait("train", trained, f"--training.out={trained}")
    assert ran.status == 1 and f"plait train --resume {trained}" in ran.error
    assert (trained / "metrics.jsonl").read_bytes() == before
    ran = plait("train", trained, "--overwrite", f"--training.out={trained}", "--training.steps=1")
    assert ran.status == 0 and names(trained) == {"step-00000001"}


def generate(plait: Run, trained: Path, *words: object, stdin: str = "") -> Ran:
    return plait("generate", trained, *words, stdin=stdin)


def test_generate_writes_text_to_stdout_and_speed_to_stderr(plait: Run, trained: Path) -> None:
    words = ("the quick", "--max-new-tokens", 12, "--seed", 1)
    ran = generate(plait, trained, *words)
    assert ran.status == 0, ran
    assert re.fullmatch(r"\d+ tokens in .*, [\d,]+ tokens/s\n", ran.err)
    assert ran.out == generate(plait, trained, *words).out
    assert ran.out == generate(plait, trained, *words, "--no-stream").out
    assert ran.out != generate(plait, trained, *words[:-1], 2).out
    assert generate(plait, trained, *words, "--echo").out == "the quick" + ran.out
    model = api.load(trained)
    text = model.generate("the quick", max_new_tokens=12, seed=1, temperature=0.8)
    assert ran.out == text + "\n"
    assert generate(plait, trained, "-", *words[1:], stdin="the quick").out == ran.out


def test_generate_options_reach_the_sampler(plait: Run, trained: Path) -> None:
    few = ("--max-new-tokens", 8, "--seed", 3)
    greedy = generate(plait, trained, "a", *few, "--temperature", 0).out
    for words in (["--top-k", 1], ["--top-p", 1e-9], ["--min-p", 1]):
        assert generate(plait, trained, "a", *few, *words).out == greedy
    stop = api.load(trained).generate("a", max_new_tokens=8, temperature=0)[3]
    cut = generate(plait, trained, "a", *few, "--temperature", 0, "--stop", stop).out
    assert cut == greedy.partition(stop)[0] + "\n" and len(cut) < len(greedy)
    assert generate(plait, trained, "a", *few, "--repetition-penalty", 1e-6, "--temperature", 0).out != greedy
    several = generate(plait, trained, "a", *few, "--num-samples", 3).out
    assert [f"--- sample {i} of 3 ---" in several for i in (1, 2, 3)] == [True] * 3
    assert generate(plait, trained, "a", "--max-new-tokens", 0).out == "\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x", "--top-p", "3"], "top_p is 3.0"),
        (["x", "--device", "tpu"], "'tpu' is no device"),
    ],
)
def test_generate_refuses(plait: Run, trained: Path, words: list[str], said: str) -> None:
    ran = generate(plait, trained, *words)
    assert ran.status == 1 and ran.out == "" and said in ran.error


def test_generate_needs_a_model_and_its_tokenizer(plait: Run, trained: Path, tmp_path: Path) -> None:
    assert f"did you mean {trained.name!r}?" in plait("generate", f"{trained}n", "x").error
    from plait.formats.native import save_model

    save_model(api.load(trained), tmp_path / "bare")
    assert "has no tokenizer" in plait("generate", tmp_path / "bare", "x").error


def test_what_a_model_writes_cannot_command_the_terminal(plait: Run) -> None:
    from plait.cli.terminal import harmless

    assert harmless("a\tb\n\x1b[2J\x07\x9b31m") == "a\tb\n�[2J��31m"
