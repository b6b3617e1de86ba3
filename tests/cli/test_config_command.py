"""`plait config show | validate | list`."""

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


def test_list(plait: Run) -> None:
    ran = plait("config", "list")
    assert all(name in ran.out for name in (*recipe_names(), *preset_names()))


def test_a_group_by_itself_shows_its_help(plait: Run) -> None:
    for group in ("config", "data", "tokenizer"):
        ran = plait(group)
        assert ran.status == 0 and f"plait {group}" in ran.out
