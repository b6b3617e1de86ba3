"""Numbers as people read them."""

from __future__ import annotations

import pytest

from plait.cli.terminal import number, seconds, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_700, "1.00M"),
        (123_456_789, "123M"),
        (7e9, "7.00G"),
        (6.02e23, "602000000P"),
        (0.25, "0.250"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1010 * 1024, "1010 KiB"),
        (3 << 30, "3.00 GiB"),
    ],
)
def test_size(value: int, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (200, "3 min 20 s"), (18_600, "5 h 10 min")],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text
