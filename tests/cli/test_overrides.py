"""Taking the values of a config out of a command line."""

from __future__ import annotations

import pytest

from plait.cli.overrides import split_overrides

OWN = {"--resume", "--dry-run", "--length", "--help", "-h"}


@pytest.mark.parametrize(
    ("line", "rest", "overrides"),
    [
        ("x.yaml --training.lr=1e-3", "x.yaml", "--training.lr=1e-3"),
        ("--training.lr 1e-3 x.yaml", "x.yaml", "--training.lr=1e-3"),
        ("x.yaml --model.d-model 64 --resume runs/a", "x.yaml --resume runs/a", "--model.d-model=64"),
        ("x.yaml training.lr=1e-3", "x.yaml", "--training.lr=1e-3"),
        ("--experiment_name a", "", "--experiment_name=a"),
        ("--training.compile --dry-run x", "--dry-run x", "--training.compile"),
        ("--training.compile", "", "--training.compile"),
        ("--training.lr -1", "", "--training.lr=-1"),
        (
            "x --length=5 --lenght=5 --dryrun",
            "x --length=5 --lenght=5 --dryrun",
            "",
        ),  # the command's own, misspelt
        ("x --steps 5", "x", "--steps=5"),  # the config knows what to suggest
        ("x -- --training.lr=1", "x -- --training.lr=1", ""),
        ("a=b.yaml ./x.y=z.yaml", "a=b.yaml ./x.y=z.yaml", ""),
    ],
)
def test_split(line: str, rest: str, overrides: str) -> None:
    assert split_overrides(line.split(), OWN) == (rest.split(), overrides.split())


def test_a_file_that_looks_like_an_override_is_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b=c").write_text("")
    assert split_overrides(["a.b=c"], OWN) == (["a.b=c"], [])
