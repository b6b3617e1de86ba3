"""What several tests of the originals' faces need around them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.config.table import TABLE
from tests.compat.bitbyte_models import TEXT


@pytest.fixture
def own_table() -> Iterator[None]:
    """The table of mixers as it was, afterwards: tests register their own."""
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of BitByte's: three files of bytes of different sizes."""
    folder = tmp_path / "bytes"
    folder.mkdir()
    for number, size in enumerate((1000, 37, 2000)):
        (folder / f"shard_{number:05d}.bin").write_bytes((TEXT * 40)[number : number + size])
    return folder
