"""The rule for skips: with PLAIT_STRICT_SKIPS=1 a skip for any but the allowed reasons is a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """\
import pytest
def test_passes(): pass
def test_no_gpu(): pytest.skip("needs a GPU")
@pytest.mark.xfail
def test_known(): assert False
def test_no_time(): pytest.skip("no time")
@pytest.mark.skipif(True, reason="broken")
def test_broken(): pass
"""
FILE = "import pytest\npytest.importorskip('no_such_package')\ndef test_never(): pass\n"


def run_pytest(folder: Path, strict: str) -> str:
    shutil.copy(Path(__file__).parent / "conftest.py", folder / "conftest.py")
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_file.py").write_text(FILE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-rA",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            str(folder),
        ],
        env={**os.environ, "PLAIT_STRICT_SKIPS": strict},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.stdout


def test_an_unexpected_skip_fails(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, strict="1")
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors" in output
    for line in (
        "FAILED test_some.py::test_no_time",
        "ERROR test_some.py::test_broken",
        "ERROR test_file.py",
    ):
        assert line in output
    assert "skipped (no time), but allowed are only: needs a GPU" in output


def test_without_the_rule_skips_are_skips(tmp_path: Path) -> None:
    assert "1 passed, 4 skipped, 1 xfailed" in run_pytest(tmp_path, strict="0")
