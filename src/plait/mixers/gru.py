"""The gated recurrent unit (arXiv 1406.1078)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from plait.mixers.recurrent import Recurrent, RecurrentOptions

Options = RecurrentOptions


class GRU(Recurrent):
    """One layer in one or two directions; its state is (h,)."""

    layer_class: ClassVar = nn.GRU
    state_names: ClassVar = ("h",)
