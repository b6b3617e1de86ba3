"""`plait config show | validate | schedule | list`."""

from __future__ import annotations

from pathlib import Path

from plait.config.load import load_config
from plait.config.recipes import preset_names, recipe_names
from tests.cli.conftest import Run


def test_show_is_a_file_that_says_the_same(plait: Run, tmp_path: Path) -> None:
    ran = plait("config", "show", "tiny", "--training.lr", "3e-4", "--data.train=a.txt")
    assert ran.status == 0 and ran.err == ""
    (tmp_path / "shown.yaml").write_text(ran.out)
    again = load_config("shown.yaml")
    assert again == load_config("tiny", ["--training.lr=3e-4", "--data.train=a.txt"])
    assert plait("config", "show", "shown.yaml").out == ran.out
    assert plait("config", "show").out.startswith("experiment_name: plait\n")


def test_validate(plait: Run, trained: Path) -> None:
    for name in (*recipe_names(), *preset_names()):
        ran = plait("config", "validate", name)
        assert ran.status == 0 and ran.out.startswith(f"{name} is valid: ")
    assert plait("config", "validate", trained).status == 0
    assert plait("config", "validate", trained / "config.yaml").status == 0


def test_validate_names_the_place_and_the_nearest_word(plait: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {pattern: [T, mambo2]}\n")
    ran = plait("config", "validate", "bad.yaml")
    assert ran.status == 1 and ran.out == ""
    assert ran.error.startswith("bad.yaml: model.pattern") and "did you mean 'mamba2'?" in ran.error
    (tmp_path / "bad.yaml").write_text("training: {setps: 5}\n")
    assert "did you mean 'steps'?" in plait("config", "validate", "bad.yaml").error
    # right as a config, but no such model can be built
    ran = plait("config", "validate", "tiny", "--model.causal=false")
    assert ran.status == 1 and "causal" in ran.error


def test_schedule(plait: Run, corpus: Path) -> None:
    words = ["tiny", "--training.checkpoint_schedule=[0, 5, 30, 999]", "--training.steps=40"]
    ran = plait("config", "schedule", *words)
    rows = dict(line.split(maxsplit=1) for line in ran.out.replace("saved and kept", "kept").splitlines())
    assert ran.status == 0 and ran.err == ""
    assert rows["steps"].strip() == "40" and rows["kept"].strip() == "0, 5, 30"
    assert rows["tokens"].strip() == "163,840, 4,096 a step"
    ran = plait(
        "config",
        "schedule",
        "tiny",
        "--rows=100",
        "--training.epochs=3",
        "--training.checkpoint_schedule.first_epoch=3",
    )
    assert "19: 3 epochs of 100 rows" in ran.out and "0, 4, 7, 19" in ran.out and "ends at step 7" in ran.out
    stages = "--training.sequence_length_schedule=[{length: 64, until: 0.25}]"
    ran = plait("config", "schedule", "tiny", stages, "--training.tokens_per_parameter=1")
    assert (
        "0% to 25%" in ran.out
        and "sequences of 64 tokens" in ran.out
        and "sequences of 256 tokens" in ran.out
    )
    assert "1 tokens for each of" in ran.out
    # what goes by epochs counts the rows of the data
    data = [
        f"--data.train={corpus}",
        "--data.sequence_length=32",
        "--training.batch_tokens=64",
        "--data.cache=c",
    ]
    ran = plait("config", "schedule", "tiny", *data, "--training.epochs=2")
    n_rows = int(ran.out.split("2 epochs of ")[1].split(" rows")[0])
    prepared = plait("data", "prepare", "tiny", *data)
    train = next(line for line in prepared.out.splitlines() if line.strip().startswith("train"))
    assert n_rows == int(train.split()[-1])


def test_schedule_says_what_it_lacks(plait: Run) -> None:
    ran = plait("config", "schedule", "foundry")
    assert ran.status == 1 and "set tokenizer.path, or give --rows" in ran.error
    assert "data.train" in plait("config", "schedule", "tiny", "--training.epochs=2").error
    assert plait("config", "schedule", "foundry", "--rows=1000").status == 0


def test_list(plait: Run) -> None:
    ran = plait("config", "list")
    assert all(name in ran.out for name in (*recipe_names(), *preset_names()))


def test_a_group_by_itself_shows_its_help(plait: Run) -> None:
    for group in ("config", "data", "tokenizer"):
        ran = plait(group)
        assert ran.status == 0 and f"plait {group}" in ran.out
