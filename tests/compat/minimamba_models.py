"""Small models of MiniMamba's, its trained ones, and a mixer of one's own, for the tests of its face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.compat.minimamba import (
    BaseMambaConfig,
    MambaForCausalLM,
    MambaLMConfig,
)
from tests.invariants import redraw

FIXTURES = Path(__file__).parents[1] / "fixtures" / "minimamba"
CASES: dict[str, Any] = json.loads((FIXTURES / "oracle.json").read_text())["cases"]
LOGITS, FEATURES, LOSS = 5e-5, 2e-5, 1e-5  # the tolerances of the fixture's README
SMALL: dict[str, Any] = {"d_model": 24, "n_layer": 3, "d_state": 6}
V = 51
language_models = pytest.mark.parametrize("case", ["lm", "lm_untied_bias"])


def language_model(mixer_cls: type[nn.Module] | None = None, **more: Any) -> MambaForCausalLM:
    model = MambaForCausalLM(MambaLMConfig(**{**SMALL, "vocab_size": V, **more}), mixer_cls=mixer_cls)
    redraw(model)
    return model.eval()


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(0))


def saved_values(model: MambaForCausalLM) -> int:
    """Numbers that a forward keeps for backward."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(ids_of(2, 64), labels=ids_of(2, 64))
    return total


class Shift(nn.Module):
    """A map of the token before; MiniMamba gives mixers ``inference_params``, which may be left out."""

    def __init__(self, config: BaseMambaConfig) -> None:
        super().__init__()
        self.map = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, inference_params: object) -> Tensor:
        assert inference_params is None
        return self.map(F.pad(x, (0, 0, 1, 0))[:, :-1])
