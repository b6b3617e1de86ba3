from __future__ import annotations

import pytest

from plait.config import table
from plait.config.block import BlockConfig
from plait.config.errors import ConfigError
from plait.config.lazy import load_object
from plait.config.model import ModelConfig
from tests.config.fakes import Clashing, Fake, FakeOptions, Other


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("T", "attention"),
        ("t", "attention"),
        ("transformer", "attention"),
        ("ATTN", "attention"),
        ("M", "mamba"),
        ("mamba1", "mamba"),
        ("M2", "mamba2"),
        ("Mamba3", "mamba3"),
        ("S4D", "s4d"),
        ("LSTM", "lstm"),
        ("F", "fake"),
    ],
)
def test_names_and_aliases(name: str, kind: str) -> None:
    assert table.canonical(name) == kind


def test_an_unknown_kind_gets_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'mamba22' is not a kind.*attention \(T, .*did you mean 'mamba2'"):
        table.canonical("mamba22")


def test_every_name_in_the_table_is_of_one_kind() -> None:
    names = [n.lower() for e in table.TABLE.values() for n in {e.kind, *map(str.lower, e.aliases)}]
    assert len(names) == len(set(names))


def test_register_and_undo() -> None:
    with table.temporary_mixer("third", "tests.config.fakes:Other", ["X3"]):
        assert table.options_class("x3") is Other.options_class
        assert "third" in table.kinds()
        table.register_mixer("third", "tests.config.fakes:Other", ["X3"])  # the same again is no error
    assert table.find_kind("third") is None


@pytest.mark.parametrize(
    ("kind", "aliases", "complaint"),
    [
        ("mamba2", (), "already names the mixer 'mamba2'"),
        ("new", ("M2",), "already names"),
        ("norm", (), "a key of the model's config"),
        ("a b", (), "cannot name a mixer"),
    ],
)
def test_a_name_that_is_taken(kind: str, aliases: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        table.register_mixer(kind, Fake, aliases)
    assert table.find_kind("new") is None


def test_an_option_with_the_name_of_a_block_option_is_refused() -> None:
    with (
        table.temporary_mixer("clashing", Clashing),
        pytest.raises(ConfigError, match="'clashing' has an option 'norm'"),
    ):
        table.options_class("clashing")


def test_the_reserved_names_are_those_of_the_schema() -> None:
    assert {*ModelConfig.model_fields, "block_pattern", "init_std"} == table.MODEL_KEYS
    assert set(BlockConfig.model_fields) == table.BLOCK_KEYS


def test_an_entry_point_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "Pointed", "tests.config.fakes:Fake"

    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))
    monkeypatch.setattr(table, "entry_points", lambda group: [Point] if group == "plait.mixers" else [])
    table._load_entry_points.cache_clear()
    try:
        assert table.options_class("pointed") is FakeOptions
    finally:
        table._load_entry_points.cache_clear()


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("plait.config.table", "the form is"),
        ("plait.nowhere:X", "no module 'plait.nowhere'"),
        ("plait.config.table:canonica", "did you mean 'canonical'"),
    ],
)
def test_a_wrong_target(target: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_object(target)
