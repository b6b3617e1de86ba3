from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import plait

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", [name for name in dir(plait) if not name.startswith("_")])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(plait, name) is not None


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'bild'.*did you mean 'build'"):
        plait.bild


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert plait.__version__ == project["version"] == importlib.metadata.version("plait")


def test_constraints_pin_every_package_that_is_installed_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for name in (*project["dependencies"], *extras["dev"], *extras["plots"]):
        assert re.split(r"[>;]", name)[0].lower().replace("_", "-") in pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
