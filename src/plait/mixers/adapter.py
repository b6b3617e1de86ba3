"""A torch module that was written for another system, as a mixer without state.

    module_mixer(build)            a class of mixers whose instances hold build(values, d_model, layer_index)
    register_module(kind, ...)     the same, under a name that a pattern may use

The module maps (S, T, d_model) to the same shape, one sequence a row; it may be what mixes along time, or a whole
block (then its Plait block has no norm, residual and MLP). It trains like any mixer; as it keeps no state,
generation runs it over the whole text again, and says so once.

Roles of its parameters: those that the module's own classes declare in ``roles``; torch's layers have theirs (the
weight of a Linear is a matrix, an Embedding's an embedding, ...); every other parameter is a vector: AdamW, no decay.
It is initialised by its own constructor and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.config.options import Options as MixerOptions
from plait.config.table import TABLE, find_kind, register_mixer
from plait.mixers.contract import Layout, Mixer, State
from plait.nn.linear import LinearSpec
from plait.nn.roles import VECTOR, Role

Build = Callable[[Mapping[str, Any], int, int], nn.Module]
"""(values, d_model, layer_index) -> the module; called again whenever weights are drawn anew."""

Call = Callable[[nn.Module, Tensor], Tensor]
"""(module, x (S, T, d_model)) -> y of x's shape; for modules that take more than x."""


class Options(MixerOptions):
    """Options of a module from elsewhere."""

    config: dict[str, Any] = Field(
        default_factory=dict, description="plain values that the module is built from; saved with the model"
    )


def plain_call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``."""
    result: Tensor = module(x)
    return result


class ModuleMixer(Mixer):
    """(S, T, d_model) -> the same through ``self.module``; ``module_mixer`` makes the subclasses."""

    options_class: ClassVar = Options
    unknown_role: ClassVar[Role] = VECTOR  # of parameters inside of it that nobody gave a role
    draws_all: ClassVar[bool] = True  # reset_parameters below writes every weight inside
    stateful = False
    build: ClassVar[Build]
    call: ClassVar[Call]
    looks_back: ClassVar[bool]

    def __init__(
        self,
        options: Options,
        d_model: int,
        *,
        causal: bool = True,
        layer_index: int = 0,
        linear: LinearSpec = "dense",
    ) -> None:
        super().__init__(d_in=d_model, d_out=d_model, causal=self.looks_back)
        self.values = options.config
        self.layer_index = layer_index
        self.module = self._built()

    def _built(self) -> nn.Module:
        module = type(self).build(self.values, self.d_in, self.layer_index)
        if not isinstance(module, nn.Module):
            raise BuildError(
                f"layer {self.layer_index}: a {type(module).__name__} was built where a torch.nn.Module is needed"
            )
        return module

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every parameter and buffer as the module's own constructor makes it, on the device where they are now."""
        mine = list(chain(self.module.parameters(), self.module.buffers()))
        if not mine:
            return
        with torch.device(mine[0].device):
            fresh = self._built()
        for old, new in zip(mine, chain(fresh.parameters(), fresh.buffers()), strict=True):
            old.copy_(new)

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract; sequences of a packed row are rows of their own here, so none sees another."""
        self.refuse_state(state)
        if x.numel() == 0:
            return x, None
        if layout.cu_seqlens is None:
            return self._run(x), None
        if self.causal:
            return layout.unpad(self._run(_in_rows(x, layout))), None
        # what looks ahead would see the pads: each sequence alone
        pieces = x.split(layout.lengths.tolist(), 1)
        return torch.cat([self._run(piece) for piece in pieces if piece.shape[1]], 1), None

    def _run(self, x: Tensor) -> Tensor:
        y = type(self).call(self.module, x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise BuildError(
                f"layer {self.layer_index}: {type(self.module).__name__} was given {tuple(x.shape)} and returned "
                f"{got}; it must return a tensor of the same shape"
            )
        return y


def module_mixer(
    build: Build, *, call: Call = plain_call, causal: bool = True, name: str = "ModuleMixer"
) -> type[ModuleMixer]:
    """The class of mixers that hold ``build``'s modules; ``causal``: whether the module looks only back.

    Nobody can see that from outside: a module that looks ahead and is said not to would be told the answer.
    """
    return type(
        name,
        (ModuleMixer,),
        {
            "__doc__": f"{name}, a module from elsewhere, as a mixer.",
            "build": staticmethod(build),
            "call": staticmethod(call),
            "looks_back": causal,
        },
    )


def register_module(
    kind: str,
    build: Build,
    *,
    call: Call = plain_call,
    causal: bool = True,
    aliases: Sequence[str] = (),
) -> str:
    """Add such a mixer to the table and return its kind; a module registered under this name before is replaced.

    ConfigError if another mixer has the name, or if it cannot be one.
    """
    mixer = module_mixer(build, call=call, causal=causal, name=kind)
    known = find_kind(kind)
    if known is not None:
        target = TABLE[known].target
        if isinstance(target, type) and issubclass(target, ModuleMixer):
            del TABLE[known]  # a class that was edited and defined again, as in a notebook
    register_mixer(kind, mixer, aliases)
    found = find_kind(kind)
    assert found is not None
    return found


def _in_rows(x: Tensor, layout: Layout) -> Tensor:
    """Packed (1, n, d) to (S, max_new, d); what follows a sequence's end repeats its last token.

    Not zeros: a norm without an eps has no gradient there.
    """
    assert layout.cu_seqlens is not None
    first = layout.cu_seqlens[:-1].to(torch.int64)
    last = (layout.cu_seqlens[1:].to(torch.int64) - 1).clamp(min=0)
    index = first[:, None] + torch.arange(layout.max_new, device=x.device)
    return x[0, torch.minimum(index, last[:, None]).clamp(max=x.shape[1] - 1)]
