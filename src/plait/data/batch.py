"""What a training step gets: a batch of packed, dense or padded rows, with what the host knows about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Packed: input_ids (1, n) with cu_seqlens (S+1). Dense: (B, T). Padded: (B, T) with attention_mask (B,
    T).

    labels are unshifted ids of the same shape, -100 where nothing is to be predicted, or (B,) for
    classification.
    """

    input_ids: Tensor  # int64
    labels: Tensor
    n_tokens: int  # without pads
    n_targets: int  # predictions the loss is over, on this rank
    cu_seqlens: Tensor | None = None  # int32, on the device; sequences at the end may be empty
    max_len: int | None = None  # no sequence is longer; a power of two or the sequence length
    attention_mask: Tensor | None = None

    def inputs(self) -> dict[str, Tensor | int]:
        """The arguments of the model's forward."""
        every: dict[str, Tensor | int | None] = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "cu_seqlens": self.cu_seqlens,
            "max_len": self.max_len,
            "attention_mask": self.attention_mask,
        }
        return {name: value for name, value in every.items() if value is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device; ``non_blocking``: a copy to a GPU does not wait for what that has to do."""
        pinned = non_blocking and torch.device(device).type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            if pinned and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()  # only from such memory a copy is on its own
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            cu_seqlens=None if self.cu_seqlens is None else move(self.cu_seqlens),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
        )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(0, n - 1).bit_length()
