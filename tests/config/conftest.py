from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.config.fakes import fake_mixers


@pytest.fixture(autouse=True)
def mixers_without_torch() -> Iterator[None]:
    with fake_mixers():
        yield
