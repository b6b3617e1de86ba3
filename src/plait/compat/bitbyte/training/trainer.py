"""BitByte's Trainer: a model, an optimizer and a dataloader of the caller's, on Plait's one training step.

    trainer = Trainer(model, optimizer, scaler, steps=1000, out="runs/bytes")
    trainer.train(dataloader)
    trainer.resume("runs/bytes/ckpt_000500.pt")

A step is an update of the weights by ``grad_accum`` batches; loss and gradient are means over all their targets.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plait.compat.bitbyte.models.language_model import ByteLM
from plait.compat.bitbyte.training.given import GivenOptimizer, GivenScaler, NextByte, cut, read_batch
from plait.config.errors import CheckpointError, DataError, TrainingError
from plait.config.training import TrainingConfig
from plait.data.batch import Batch
from plait.formats.foreign import read_file, unwrapped
from plait.tokenizers.files import write_file
from plait.training.distributed import World
from plait.training.schedules import lr_scale, progress_of, sequence_length
from plait.training.step import NotFinite, Update, train_step

CURRICULUM = ((0.2, 2048), (0.5, 4096))  # until which share of the run rows have at most so many bytes


class Trainer:
    """Trains ``model``, ids (B, T) -> logits (B, T, V): a model of this package, or any other module.

    The learning rates of ``optimizer`` are peaks: warm-up over ``warmup_frac`` of ``steps``, then a cosine down to
    ``min_lr_ratio``. ``scaler``: None, or torch's GradScaler, which, if enabled, means float16. ``curriculum``: shares
    of the run until which rows are cut to a length; ``seq_len_cap``: they are never longer. ``args`` are kept in
    checkpoints, which are written into ``out`` every ``save_every`` steps and at the end. ``max_skips``: steps in a row
    that may be left out because the loss or the gradient is not finite. Several processes: wrap the model in DDP.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        *,
        steps: int = 1000,
        grad_accum: int = 1,
        grad_clip: float | None = 1.0,
        warmup_frac: float = 0.03,
        min_lr_ratio: float = 0.1,
        curriculum: Sequence[tuple[float, int]] = CURRICULUM,
        seq_len_cap: int | None = None,
        out: str | PathLike[str] | None = None,
        log_every: int = 100,
        save_every: int = 1000,
        args: argparse.Namespace | Mapping[str, Any] | None = None,
        max_skips: int = 10,
        log: Callable[[str], object] = print,
    ) -> None:
        self.forward, self.model = model, _unwrapped(model)
        self.optimizer = GivenOptimizer(optimizer, self.model)
        self.scaler = GivenScaler(scaler)
        self.objective = NextByte()
        self.grad_accum, self.seq_len_cap = grad_accum, seq_len_cap
        self.out = None if out is None else Path(out)
        self.log_every, self.save_every, self.log = log_every, save_every, log
        self.args = dict(vars(args) if isinstance(args, argparse.Namespace) else args or {})
        self.config = TrainingConfig.model_validate(
            {
                "steps": steps,
                "schedule": "cosine",
                "warmup": warmup_frac,
                "min_lr_ratio": min_lr_ratio,
                "grad_clip": grad_clip,
                "skip_nonfinite": max_skips,
                "precision": "fp16" if self.scaler.active else "fp32",
                "sequence_length_schedule": [{"until": until, "length": n} for until, n in curriculum],
            }
        )
        device = next(self.model.parameters()).device
        here = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
        self.world = World(rank, size, device)
        if size > 1 and not isinstance(model, DistributedDataParallel):
            raise TrainingError(f"{size} processes train one model: wrap it in DistributedDataParallel")
        self.step = self.skipped = 0
        self.loss: float | None = None

    def train(self, dataloader: Iterable[Any]) -> float | None:
        """Train to the end of ``steps`` and return the last loss, in nats a byte; see ``read_batch`` for batches.

        ``dataloader`` is the whole run's from its beginning, gone through again whenever it ends: after ``resume`` the
        batches of the steps that were made are passed over.
        """
        config, items = self.config, _endless(dataloader)
        for _ in range(self.step * self.grad_accum):
            next(items)
        self.model.train()
        while self.step < config.steps:
            progress = progress_of(self.step, config.steps)
            batches = [
                batch for item in islice(items, self.grad_accum) for batch in self._cut(item, progress)
            ]
            n_targets = int(self.world.sums([sum(batch.n_targets for batch in batches)])[0])
            scale = lr_scale(config, config.steps, self.step, progress)
            self.optimizer.set_lr(scale)
            self._take(self._update(batches, n_targets), scale)
            if self.save_every and self.step % self.save_every == 0 and self.step < config.steps:
                self._save_out()
        self._save_out()
        return self.loss

    def save(self, path: str | PathLike[str]) -> None:
        """Write {step, model, opt, scaler, args, model_family} whole or not at all; the first process alone does."""
        if not self.world.first:
            return
        lm = self.model if isinstance(self.model, ByteLM) else None
        stream = io.BytesIO()
        torch.save(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "opt": self.optimizer.parts[0].state_dict(),
                "scaler": self.scaler.state_dict(),
                "args": {**self.args, **({} if lm is None else lm.settings)},
                "model_family": type(self.model).__name__ if lm is None else lm.family,
            },
            stream,
        )
        try:
            write_file(Path(path), stream.getvalue())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error

    def resume(self, path: str | PathLike[str], opt_state: bool = True) -> int:
        """Go on from such a checkpoint, or one of BitByte's own, and return its step; nothing in it is executed.

        ``opt_state`` False takes the weights alone, as one of BitByte's with attention needs: its optimizer's state is
        of other parameters. CheckpointError if it is of another model.
        """
        held = read_file(Path(path))
        if not isinstance(held, Mapping) or not isinstance(held.get("model"), Mapping):
            raise CheckpointError(f"{path} is no checkpoint of BitByte's form: it has no 'model'")
        step = held.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CheckpointError(f"{path}: its step is {step!r}")
        try:
            self.model.load_state_dict(unwrapped(held["model"]))
        except (CheckpointError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
        if opt_state:
            self.optimizer.load(held.get("opt"))
            self.scaler.load_state_dict(held.get("scaler"))
        self.step, self.skipped = step, 0
        return step

    def _cut(self, item: Any, progress: float) -> Iterable[Batch]:
        ids, labels = read_batch(item)
        longest = ids.shape[1] if self.seq_len_cap is None else min(ids.shape[1], self.seq_len_cap)
        return cut(ids, labels, sequence_length(self.config, longest, progress))

    def _update(self, batches: list[Batch], n_targets: int) -> Update:
        may_skip = self.skipped < self.config.skip_nonfinite
        try:
            return train_step(
                self.forward,
                self.objective,
                self.optimizer,
                batches,
                n_targets,
                self.config,
                self.scaler,
                self.world,
                may_skip,
            )
        except NotFinite as error:
            raise TrainingError(
                f"{error} at step {self.step + 1}, after {self.skipped} steps that were left out: the weights are as "
                "they were; resume a checkpoint with a lower learning rate"
            ) from None

    def _take(self, update: Update, scale: float) -> None:
        self.step += 1
        self.skipped = self.skipped + 1 if update.skipped and not update.overflowed else 0
        if not update.skipped:
            self.loss = update.loss
        if self.world.first and self.log_every and (self.step % self.log_every == 0 or update.skipped):
            bits = update.loss / math.log(2)
            what = (
                "left out: not finite"
                if update.skipped
                else f"loss {update.loss:.4f}, {bits:.4f} bits a byte"
            )
            self.log(
                f"step {self.step}/{self.config.steps}: {what}, lr {scale * self.optimizer.peaks[0]:.3g}"
            )

    def _save_out(self) -> None:
        if self.out is not None:
            self.save(self.out / f"ckpt_{self.step:06d}.pt")


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _endless(dataloader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for item in dataloader:
            empty = False
            yield item
        if empty:
            raise DataError(
                "the dataloader gave no batch: it has none, or can be gone through only once and has too few"
            )
