"""Numbers with the word that they count."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """``1 pair``, ``1,200 pairs``, ``0.5 epochs``."""
    written = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{written} {noun}" if number == 1 else f"{written} {noun}s"
