"""An optimizer, a loss scaler and a dataloader that a caller made, as Plait's training step takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.config.errors import CheckpointError, DataError, TrainingError
from plait.config.schema import Config
from plait.data.batch import IGNORED, Batch
from plait.mixers.layout import Layout
from plait.models.loss import cross_entropy, next_token_targets
from plait.models.output import Output
from plait.tokenizers.bytes import BytesTokenizer
from plait.training.objectives import CausalLM
from plait.training.optimizers import Optimizer
from plait.training.precision import GROW_AFTER, LossScaler


class NextByte(CausalLM):
    """The next byte, by any module from ids (B, T) to logits (B, T, V); the shift is Plait's one."""

    def __init__(self) -> None:
        super().__init__(Config(), BytesTokenizer(()))

    def run(self, forward: nn.Module, batch: Batch) -> Output:
        """Logits and the summed loss."""
        logits = forward(batch.input_ids)
        layout = Layout.dense(*batch.input_ids.shape, device=batch.input_ids.device)
        loss_sum, n_targets = cross_entropy(logits, next_token_targets(batch.labels, layout))
        return Output(logits=logits, loss_sum=loss_sum, n_targets=n_targets)


class GivenOptimizer(Optimizer):
    """One of torch's optimizers; its groups' learning rates as they are now are the peaks of the schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.parts = [optimizer]
        self.named = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter not in names:
                raise TrainingError(
                    "the optimizer holds a parameter that the model has not: make it from model.parameters(), after "
                    "weights were loaded"
                )
            self.named[names[parameter]] = parameter
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set_lr(self, scale: float) -> None:
        """Set each group's learning rate to ``scale`` times its peak."""
        for group, peak in zip(self.parts[0].param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale

    def load(self, saved: Any) -> None:
        """Take a saved state; CheckpointError unless it is of such parameters, one for one."""
        if not isinstance(saved, Mapping):
            raise CheckpointError("the checkpoint has no optimizer's state: resume(path, opt_state=False)")
        own = list(self.named.values())
        places = [place for group in saved["param_groups"] for place in group["params"]]
        fits = len(places) == len(own) and all(
            value.shape == parameter.shape
            for place, parameter in zip(places, own, strict=False)
            for value in saved["state"].get(place, {}).values()
            if isinstance(value, Tensor) and value.dim()
        )
        if not fits:
            raise CheckpointError(
                "the optimizer's state in the checkpoint is of other parameters, or of 8-bit Adam, which was not taken "
                "over: resume(path, opt_state=False) takes the weights alone"
            )
        self.parts[0].load_state_dict(dict(saved))


class GivenScaler(LossScaler):
    """torch's GradScaler as far as its scale goes: Plait decides once a step for all parameters, by its own rule."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        enabled = scaler is not None and scaler.is_enabled()
        super().__init__("fp16" if enabled else "fp32")
        if scaler is not None and enabled:
            rule = (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())
            if rule != (2.0, 0.5, GROW_AFTER):
                raise TrainingError(
                    f"the loss scale doubles after {GROW_AFTER} good steps and is halved at an overflow; the "
                    f"GradScaler says otherwise: {rule}"
                )
            self.scale = scaler.get_scale()

    def state_dict(self) -> dict[str, Any]:
        """As torch's GradScaler gives it; empty if nothing is scaled."""
        if not self.active:
            return {}
        return {
            "scale": self.scale,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": GROW_AFTER,
            "_growth_tracker": self.good_steps,
        }

    def load_state_dict(self, saved: Any) -> None:
        """Take that back; a checkpoint without it leaves the scale as it is."""
        if self.active and isinstance(saved, Mapping) and saved:
            self.scale, self.good_steps = float(saved["scale"]), int(saved["_growth_tracker"])


def read_batch(item: Any) -> tuple[Tensor, Tensor]:
    """Ids and unshifted labels, (B, T) each, of what a dataloader gives.

    That is ids (B, T), {"input_ids", "labels"} with unshifted labels, or a pair of ids and their next bytes, which
    are then one token longer here. DataError for anything else.
    """
    if isinstance(item, Mapping) and set(item) <= {"input_ids", "labels"} and "input_ids" in item:
        ids, labels = item["input_ids"], item.get("labels", item["input_ids"])
    elif isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(t, Tensor) for t in item):
        x, y = item
        ids = torch.cat([x, y[:, -1:].clamp(min=0)], 1)
        labels = torch.cat([torch.full_like(x[:, :1], IGNORED), y], 1)
    elif isinstance(item, list | tuple) and len(item) == 1:
        ids = labels = item[0]
    else:
        ids = labels = item
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape != labels.shape:
        raise DataError(
            "a batch is ids (B, T), a pair (ids, next bytes), or {'input_ids', 'labels'}; got a "
            f"{type(item).__name__}"
        )
    return ids.long(), labels.long()


def cut(ids: Tensor, labels: Tensor, length: int) -> Iterable[Batch]:
    """The same bytes in rows of ``length``; what is left over of each row makes a batch of its own."""
    whole = ids.shape[1] // length * length
    for part in (slice(0, whole), slice(whole, None)):
        size = min(length, ids[:, part].shape[1])
        if size < 2:
            continue  # nothing to predict
        x, y = ids[:, part].reshape(-1, size), labels[:, part].reshape(-1, size)
        yield Batch(x, y, x.numel(), int((y[:, 1:] != IGNORED).sum()))
