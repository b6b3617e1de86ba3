"""How commands write: text to stdout, remarks and progress to stderr, tables that fit the terminal.

Numbers are short and end with their unit: ``1.23M``, ``4.5 MiB``.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_PIPED_WIDTH = 140  # without a terminal there is no width to fit
_CONTROLS = {n: "\N{REPLACEMENT CHARACTER}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n"}


def stdout() -> Console:
    """What was asked for goes here."""
    return _console(stderr=False)


def stderr() -> Console:
    """Remarks about the work go here."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


def table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    """An empty table; the first ``left`` columns hold words, the others numbers."""
    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < left else "right")
    return made


def pairs(rows: list[tuple[str, Any]]) -> Table:
    """Names and what they are, without lines or a heading."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, str(value))
    return made


def harmless(text: str) -> str:
    """Text without the control characters that a terminal obeys; tabs and line ends stay."""
    return text.translate(_CONTROLS)


def write(text: str) -> None:
    """What a model writes, to stdout, at once; it must not command a terminal."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def number(value: float) -> str:
    """``950``, ``12.3k``, ``1.23M``, ``4.5G``, ``6.7T``: three digits."""
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T", "P"), "")


def size(n_bytes: float) -> str:
    """``12 B``, ``3.4 KiB``, ``1.2 GiB``."""
    return _scaled(n_bytes, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), " ")


def seconds(value: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 20 s``, ``5 h 10 min``."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _scaled(value: float, base: float, units: tuple[str, ...], space: str) -> str:
    place = 0
    while abs(value) >= 0.9995 * base and place + 1 < len(units):
        value /= base
        place += 1
    if place == 0 and float(value).is_integer():
        text = f"{value:.0f}"
    else:
        text = f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"
    return f"{text}{space}{units[place]}".strip()
