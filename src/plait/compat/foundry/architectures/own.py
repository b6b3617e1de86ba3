"""An architecture of one's own as the only layer of Plait's model, so that the one trainer trains it.

It is given the token ids and its logits are the model's; the loss is Plait's, so labels are shifted once and pads and
neighbours in a batch change nothing. It keeps no state: generation runs it over the whole text again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.compat.foundry.architectures.base import BaseLanguageModel
from plait.compat.foundry.config import ExperimentConfig
from plait.config.errors import BuildError
from plait.config.originals.foundry_schema import OWN_ARCHITECTURES
from plait.config.table import register_mixer
from plait.mixers.adapter import ModuleMixer
from plait.mixers.adapter import Options as ModuleOptions
from plait.mixers.contract import Layout, State
from plait.nn.linear import LinearSpec

_VOCABULARY = "vocabulary"


class Options(ModuleOptions):
    """Options of an architecture of one's own: the experiment that it is built from is its ``config``."""


class OwnArchitecture(ModuleMixer):
    """Ids (S, T) in, logits (S, T, rows) out, by a BaseLanguageModel; ``register_own`` makes the subclasses."""

    options_class: ClassVar = Options
    reads_ids: ClassVar = True
    architecture: ClassVar[type[BaseLanguageModel]]
    looks_back = True

    def __init__(
        self,
        options: Options,
        d_model: int,
        *,
        causal: bool = True,
        layer_index: int = 0,
        linear: LinearSpec = "dense",
        vocab_rows: int = 0,
    ) -> None:
        # the experiment is built for the vocabulary that the model has
        described = options.model_copy(update={"config": {**options.config, _VOCABULARY: vocab_rows}})
        super().__init__(described, d_model, causal=causal, layer_index=layer_index, linear=linear)
        self.d_out = vocab_rows
        self.causal = self._language_model.supports_generation

    @property
    def _language_model(self) -> BaseLanguageModel:
        assert isinstance(self.module, BaseLanguageModel)
        return self.module

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract; x is what nothing reads, and is there so that each parameter has a gradient."""
        self.refuse_state(state)
        if layout.ids is None:
            raise BuildError(f"{type(self.module).__name__} reads token ids; embeddings were given")
        y = x.new_zeros(*x.shape[:-1], self.d_out)
        if x.numel() == 0:
            return y, None
        if layout.cu_seqlens is None:
            logits = self._logits(layout.ids, torch.ones_like(layout.ids))
        else:
            lengths = layout.lengths.tolist()
            rows = [row for row, length in enumerate(lengths) if length]
            most = max(lengths)
            ids, mask = (layout.pad(t)[rows, :most] for t in (layout.ids, torch.ones_like(layout.ids)))
            real = mask.bool()
            logits = self._logits(ids, mask)[real][None]
        return logits + 0.0 * x.sum(-1, keepdim=True), None

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self._language_model(ids, attention_mask=mask).logits
        wanted = (*ids.shape, self.d_out)
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise BuildError(
                f"{type(self.module).__name__} was given ids {tuple(ids.shape)} and returned logits {got}; they must "
                f"be {wanted}: the vocabulary is config.tokenizer.vocab_size"
            )
        return logits


def register_own(name: str, architecture: type[BaseLanguageModel]) -> None:
    """Let ``model.architecture: name`` mean this class, in experiments and in saved models."""

    def build(values: Mapping[str, Any], d_model: int, layer_index: int) -> nn.Module:
        given = {key: value for key, value in values.items() if key != _VOCABULARY}
        experiment = ExperimentConfig.model_validate(given)
        size = values[_VOCABULARY]
        return architecture.from_config(
            experiment.replace(tokenizer=experiment.tokenizer.replace(vocab_size=size))
        )

    kind = f"foundry_{name}"
    mixer = type(
        kind,
        (OwnArchitecture,),
        {
            "__doc__": f"{architecture.__name__}, an architecture from elsewhere, as a mixer.",
            "architecture": architecture,
            "build": staticmethod(build),
        },
    )
    register_mixer(kind, mixer)
    OWN_ARCHITECTURES[name] = kind
