"""Mixers of one's own, ``mixer_cls(config=config)``, as kinds of Plait's table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.compat.minimamba.config import BaseMambaConfig
from plait.compat.minimamba.s6 import S6
from plait.config.errors import BuildError
from plait.config.table import TABLE, register_mixer
from plait.mixers.adapter import ModuleMixer, register_module
from plait.mixers.contract import Layout, State

MixerClass = type[nn.Module]


class S6Mixer(ModuleMixer):
    """Holds a subclass of S6 that keeps S6's forward, and so its states."""

    stateful = True
    looks_back = True

    @property
    def _s6(self) -> S6:
        assert isinstance(self.module, S6)
        return self.module

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract."""
        result: tuple[Tensor, State | None] = self._s6(x, layout, state)
        return result

    def init_state(
        self,
        n_seq: int,
        capacity: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """S6's own."""
        return self._s6.init_state(n_seq, capacity, device, dtype)

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """S6's own."""
        return self._s6.flops(n_new, n_past)


def mixer_kind(mixer_cls: MixerClass | None, config_cls: type[BaseMambaConfig]) -> str:
    """The kind that a pattern names for a class of mixers, registered if need be; ``mamba`` for S6 and None.

    The class is called as ``mixer_cls(config=config)`` with a config of ``config_cls``; what it makes maps
    (B, L, d_model) to the same shape, looks only back, and may take ``inference_params``, which is None.
    """
    if mixer_cls is None or mixer_cls is S6:
        return "mamba"
    if not (isinstance(mixer_cls, type) and issubclass(mixer_cls, nn.Module)):
        raise BuildError(f"mixer_cls is {mixer_cls!r}; it must be a subclass of torch.nn.Module")

    def build(values: Mapping[str, Any], d_model: int, layer_index: int) -> nn.Module:
        module = mixer_cls(config=config_cls.from_dict(values))
        module.layer_idx = layer_index  # type: ignore[assignment]  # MiniMamba's mixers know their place
        return module

    kind = "minimamba_" + re.sub(r"\W", "_", mixer_cls.__qualname__).lower()
    if issubclass(mixer_cls, S6) and mixer_cls.forward is S6.forward:
        TABLE.pop(kind, None)  # a class that was edited and defined again, as in a notebook
        register_mixer(
            kind, type(kind, (S6Mixer,), {"__doc__": S6Mixer.__doc__, "build": staticmethod(build)})
        )
        return kind
    with_params = len(inspect.signature(mixer_cls.forward).parameters) > 2

    def call(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x, None) if with_params else module(x)
        return y

    return register_module(kind, build, call=call)
