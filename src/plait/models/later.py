"""Logits that are computed when somebody reads them: most losses need none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from plait.config.errors import BuildError
from plait.models.door import Entry
from plait.models.heads import LMHead


def later(head: LMHead, hidden: Tensor, entry: Entry) -> Callable[[], Tensor]:
    """A function that gives the logits (B, T, V) of hidden states, as they would be computed now.

    Precision and grad mode are those of now. It raises BuildError once the weights have changed.
    """
    device, weight = hidden.device.type, head.unembedding.weight
    narrow = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if narrow else None
    differentiable = torch.is_grad_enabled()
    counted = not weight.is_inference()  # such tensors have no version
    version = weight._version if counted else 0

    def make() -> Tensor:
        if counted and weight._version != version:
            raise BuildError(
                "the logits of this output were not computed, and the weights have changed since; read output.logits "
                "before the update, or call the model with logits=True"
            )
        precision = torch.autocast(device, dtype=dtype) if narrow else nullcontext()
        with torch.set_grad_enabled(differentiable), precision:
            return entry.restore_pads(head(hidden))

    return make
