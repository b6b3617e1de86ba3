"""The manifest: what is not as it was written is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.config.errors import CheckpointError
from plait.formats.folders import (
    checkpoint_name,
    checkpoint_step,
    find_model_folder,
    list_checkpoints,
    newest_good,
)
from plait.formats.manifest import verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.bin").write_bytes(b"one")
    (tmp_path / "two.bin").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"not listed")
    write_manifest(tmp_path)
    return tmp_path


def test_as_written(folder: Path) -> None:
    verify_manifest(folder)
    write_manifest(folder)
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a/one.bin", b"on", "has 2 bytes instead of 3: it is truncated or changed"),
        ("a/one.bin", b"onE", "was changed: its sha256"),
        ("two.bin", None, "is missing"),
        ("a/three.bin", b"", "does not belong here"),
    ],
)
def test_what_is_not_as_written_is_named(folder: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {words}"):
        verify_manifest(folder)
    verify_manifest(folder, only=("a/one.bin",) if name != "a/one.bin" else ("two.bin",))


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (1200, 5, 123456789):
        folder = tmp_path / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        write_manifest(folder)
    for name in (".step-00000007.x.tmp", "abandoned-step-00000009", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    found = list_checkpoints(tmp_path)
    assert [checkpoint_step(path) for path in found] == [5, 1200, 123456789]
    assert find_model_folder(tmp_path) == found[-1] == newest_good(found)
    (found[-1] / "manifest.json").unlink()
    assert newest_good(found) == found[1]
    assert newest_good([]) is None
