"""The long short-term memory (Hochreiter and Schmidhuber, 1997)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from plait.mixers.recurrent import Recurrent, RecurrentOptions

Options = RecurrentOptions


class LSTM(Recurrent):
    """One layer in one or two directions; its state is (h, c)."""

    layer_class: ClassVar = nn.LSTM
    state_names: ClassVar = ("h", "c")
