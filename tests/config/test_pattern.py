from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.config.errors import ConfigError
from plait.config.pattern import parse_pattern


def kinds(value: Any) -> list[str]:
    return [entry.kind for entry in parse_pattern(value)]


T, M, M2 = "attention", "mamba", "mamba2"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("T", [T]),
        ("M2*3 T M2*3 T", [M2, M2, M2, T] * 2),
        ("(M M T)*4", [M, M, T] * 4),
        ("((M T)*2 M2)*2 T", [M, T, M, T, M2] * 2 + [T]),
        ("m2,transformer , MAMBA", [M2, T, M]),
        ("M2 * 2 T", [M2, M2, T]),
        ("(T)", [T]),
        (["T", "mamba", "M2*2", "(M T)*1"], [T, M, M2, M2, M, T]),
        (["T"] * 12 + ["M"] * 8, [T] * 12 + [M] * 8),
        (("T", "M"), [T, M]),
        ([{"mixer": "mamba2", "d_state": 128}, "T"], [M2, T]),
    ],
)
def test_patterns(pattern: Any, expected: list[str]) -> None:
    assert kinds(pattern) == expected


def test_an_entry_keeps_its_options_and_its_place() -> None:
    entries = parse_pattern(["T*2", {"mixer": "M2", "d_state": 128, "mlp": "none"}])
    assert [entry.item for entry in entries] == [0, 0, 1]
    assert entries[2].options == {"d_state": 128, "mlp": "none"}
    assert not entries[0].options


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("", "names no layer"),
        ([], "names no layer"),
        ("T*0", "at least 1"),
        ("T*", "a count must follow"),
        ("T*M", "a count must follow"),
        ("(T M", "never closed"),
        ("T M)*2", "no opening bracket"),
        ("()*2", "no layer"),
        ("3 T", "does not belong"),
        ("T - M", r"item 2 \('-'\): it does not belong"),
        ("(T ; M)", r"';'"),
        (
            "mamba5 T",
            "did you mean 'mamba'|did you mean 'mamba2'|did you mean 'mamba3'|did you mean 'mamba1'",
        ),
        ("MMT", "separate the names by spaces"),
        ("T*10001", "the most layers are 10000"),
        ("((T*100)*100)*2", "the most layers are 10000"),
        (7, "a string like .* or a list"),
        ([7], r"\[0\]: expected a kind"),
        (["T", {"d_state": 3}], r"\[1\]: the mapping has no key 'mixer'"),
        (["T", {"mixer": "mambo"}], r"\[1\].mixer: 'mambo'.*did you mean 'mamba'"),
        ([{"mixer": 3}], r"\[0\].mixer: expected the name"),
    ],
)
def test_wrong_patterns(pattern: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_pattern(pattern)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.tuples(st.sampled_from(["T", "M", "M2", "lstm"]), st.integers(1, 4)), min_size=1, max_size=6)
)
def test_writing_and_reading(runs: list[tuple[str, int]]) -> None:
    text = " ".join(f"{name}*{count}" for name, count in runs)
    assert kinds(text) == kinds([name for name, count in runs for _ in range(count)])


@given(st.text(alphabet="TM2()* ,x-", max_size=12))
def test_any_text_gives_layers_or_one_clear_line(text: str) -> None:
    try:
        assert parse_pattern(text)
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)
