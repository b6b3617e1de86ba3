"""Precision of products: weights are float32, autocast narrows what may be, float16 scales its loss.

torch's GradScaler decides for each optimizer alone whether to skip a step; with two of them (Muon and
AdamW) half of a step could be made. The norm of the whole gradient is computed anyway, so the rule is
applied to it here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from plait.config.errors import TrainingError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["auto", "fp32", "bf16", "fp16"]
FIRST_SCALE, GROW_AFTER, SMALLEST_SCALE = 2.0**16, 2000, 2.0**-14


def product_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; auto: bfloat16 on a GPU that computes in it, else float32."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return DTYPES.get(precision, torch.float32)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward runs; none for float32."""
    dtype = product_dtype(precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


class LossScaler:
    """The factor of the loss that keeps float16 gradients in range: halved on overflow, else slowly doubled.

    For other precisions it is always 1 and never skips.
    """

    def __init__(self, precision: str) -> None:
        self.active = precision == "fp16"
        self.scale = FIRST_SCALE if self.active else 1.0
        self.good_steps = 0

    def accept(self, norm: float) -> bool:
        """Whether a step with a gradient of this norm may be made; sets the scale of the next one.

        TrainingError when float16 cannot hold the gradients at any scale.
        """
        finite = norm == norm and norm != float("inf")
        if not self.active:
            return finite
        if not finite:
            self.scale /= 2.0
            self.good_steps = 0
            if self.scale < SMALLEST_SCALE:
                raise TrainingError(
                    "the gradient overflows float16 however small the loss is scaled; "
                    "use --training.precision=bf16 or a lower learning rate"
                )
            return False
        self.good_steps += 1
        if self.good_steps == GROW_AFTER:
            self.scale *= 2.0
            self.good_steps = 0
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Take back what ``state`` gave, if this run scales at all."""
        if self.active:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
