"""What is wrong with a config is told in Plait's own words, whatever is given; numbers agree with their nouns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from plait.compat.foundry.config import ExperimentConfig
from plait.config.errors import ConfigError
from plait.config.originals.bitbyte import Flags
from plait.config.originals.nanochat import BaseTrain
from plait.config.originals.nanochat2026 import BaseTrain2026
from plait.config.schema import Config
from plait.config.section import Section
from plait.config.words import counted

JUNK: list[Any] = [None, True, -1, 1.5, 10**400, float("nan"), "x", "", [], [1], [None], {"a": 1}, {1: 2}]
JUNK += [{"kind": "zz"}, [{}], [{"mixer": "Q"}], [[1]], [{"until": 2, "length": 0}], "T*0", b"x", object()]
NOT_OURS = ("Value error", "Assertion failed", "Input should", "validation error", "pydantic", "\n")


def wrongs(section: type[Section], wrap: Callable[[Any], Any] = lambda x: x) -> Iterator[Any]:
    """Junk in every place of a section and of the sections in it."""
    for name in section.model_fields:
        yield from (wrap({name: junk}) for junk in JUNK)
        inner = section.subsection(name)
        if inner is not None:
            yield from wrongs(inner, lambda x, name=name: wrap({name: x}))


@pytest.mark.parametrize("section", [Config, ExperimentConfig, BaseTrain, BaseTrain2026, Flags])
def test_what_is_wrong_is_one_line_of_ours(section: type[Section]) -> None:
    refused = 0
    for values in wrongs(section):
        try:
            section.model_validate(values)
        except ConfigError as error:
            refused += 1
            assert not any(words in str(error) for words in NOT_OURS), f"{values}: {error}"
    assert refused > 10 * len(section.model_fields)


def test_a_number_and_its_noun() -> None:
    assert [counted(n, "pair") for n in (0, 1, 2, 1200)] == ["0 pairs", "1 pair", "2 pairs", "1,200 pairs"]
    assert [counted(n, "epoch") for n in (0.5, 1.0, 20.0)] == ["0.5 epochs", "1 epoch", "20 epochs"]
