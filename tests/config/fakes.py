"""Mixers without torch: the config floor asks a mixer's class for nothing but its Options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.config.options import Options
from plait.config.table import temporary_mixer


class FakeOptions(Options):
    d_state: int = Field(16, gt=0)
    rate: float = Field(0.5, gt=0, le=1)
    flag: bool = False
    limits: tuple[float, float] = (0.0, float("inf"))
    rank: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    pairs: int = Field(2, gt=0, multiple_of=2)
    mode: Literal["fast", "exact"] = "fast"


class Fake:
    options_class: ClassVar = FakeOptions


class OtherOptions(Options):
    n_head: int | None = Field(None, gt=0)


class Other:
    options_class: ClassVar = OtherOptions


class ClashingOptions(Options):
    norm: bool = True


class Clashing:
    options_class: ClassVar = ClashingOptions


@contextmanager
def fake_mixers() -> Iterator[None]:
    with temporary_mixer("fake", Fake, ("F", "faux")), temporary_mixer("other", Other, ("O",)):
        yield
