"""S6, the selective state space layer: Plait's Mamba, on whole sequences or as a mixer of a model."""

from __future__ import annotations

from typing import Any, Self

from plait.compat.minimamba.config import BaseMambaConfig
from plait.config.errors import BuildError
from plait.config.originals.minimamba import mixer_options
from plait.mixers.contract import Layout, State
from plait.mixers.mamba import Mamba, Options


class S6(Mamba):
    """(B, L, d_model) -> the same; ``layer(x)`` reads whole sequences.

    A subclass that leaves ``forward`` as it is keeps its states in a model, so generation does not recompute.
    """

    def __init__(self, config: BaseMambaConfig) -> None:
        super().__init__(Options(**mixer_options(config.checked())), config.d_model)
        self.config = config

    @classmethod
    def over(cls, mixer: Mamba) -> Self:
        """A model's own mixer as an S6: no copy, but one module under two classes, hooks and weights included."""
        face = cls.__new__(cls)
        face.__dict__ = mixer.__dict__
        return face

    def forward(self, x: Any, inference_params: Any = None, state: State | None = None) -> Any:
        """x (B, L, d_model) -> the same shape. A mixer's call, with a Layout and a state, is Mamba's own."""
        if isinstance(inference_params, Layout):
            return super().forward(x, inference_params, state)
        refuse_params(inference_params)
        return super().forward(x, Layout.dense(x.shape[0], x.shape[1], device=x.device))[0]


def refuse_params(inference_params: object) -> None:
    """BuildError for InferenceParams given to a layer by itself."""
    if inference_params is not None:
        raise BuildError(
            "a layer by itself keeps no state: give InferenceParams to the model, or to its MambaEncoder"
        )
