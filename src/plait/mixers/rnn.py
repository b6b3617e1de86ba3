"""The Elman network, h_t = tanh(W x_t + U h_{t-1} + b) (Elman, 1990)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from plait.mixers.recurrent import Recurrent, RecurrentOptions

Options = RecurrentOptions


class RNN(Recurrent):
    """One layer in one or two directions; its state is (h,)."""

    layer_class: ClassVar = nn.RNN
    state_names: ClassVar = ("h",)
