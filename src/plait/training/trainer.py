"""The training loop: one flat function from a config to a run folder.

    runs/name/
      config.yaml  env.json  metrics.jsonl     what was run, on what, how it went
      samples/                                 what the model wrote on the way
      checkpoints/step-00001200/               see checkpoint.py

A step is one update of the weights, however many micro-batches it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from plait.config.errors import CheckpointError, TrainingError, dotted
from plait.config.explain import show
from plait.config.load import load_config, save_config
from plait.config.schema import Config
from plait.config.words import counted
from plait.data.batch import Batch
from plait.formats.folders import CHECKPOINTS, RUN_CONFIG, checkpoint_name
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.training import rng
from plait.training.checkpoint import RunState, save_checkpoint
from plait.training.core import ask_tasks, core_record
from plait.training.distributed import World, session
from plait.training.environment import write_environment
from plait.training.evaluate import Evaluation, evaluate
from plait.training.folder import make_room, refuse_another_run
from plait.training.heap import kept_memory
from plait.training.metrics import Metrics, writing
from plait.training.objectives import target_bytes
from plait.training.precision import product_dtype
from plait.training.progress import Clock, Progress, Status, duration
from plait.training.resume import differences, find_checkpoint, resumed_config
from plait.training.samples import write_samples
from plait.training.schedules import decay_scale, lr_scale, muon_momentum, progress_of, sequence_length
from plait.training.settings import torch_settings
from plait.training.setup import Setup, set_up
from plait.training.signals import StopRequest, stop_request
from plait.training.step import NotFinite, Update, train_step

Stopped = Literal["steps", "time", "signal"]
Metadata = Callable[[RunState, int], Mapping[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended, and what it made."""

    run: Path
    checkpoint: Path | None  # the last one
    step: int
    tokens: int
    elapsed: float  # seconds of training, those before a resume included
    loss: float | None  # nats a target, of the last step
    validation: Evaluation | None  # of the last evaluation
    stopped: Stopped
    model: Model
    tokenizer: Tokenizer
    core: float | None = None  # of the last evaluation of CORE


def train(
    config: Config | Mapping[str, Any] | str | PathLike[str] | None = None,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    console: Console | None = None,
    metadata: Metadata | None = None,
) -> TrainResult:
    """Train as ``config`` says: a Config, a mapping, a file or a recipe's name. Under torchrun on all processes.

    resume: a run folder, a checkpoint, or "auto" (the newest checkpoint of this config's run, else a new
    run); without a config, that of the resumed run. overwrite: begin anew in a folder that holds a run.
    metadata: what each checkpoint's metadata.json holds, from the state of the run and the rows of an epoch.
    PlaitError for whatever is wrong; the random state, threads and determinism of the caller are as before
    afterwards.
    """
    if config is None and resume is not None and resume != "auto":
        config = resumed_config(resume)
    config = load_config(config)
    with (
        session(config.training) as world,
        torch_settings(config.training),
        rng.preserved(),
        kept_memory(world.device),
    ):
        return Trainer(
            config,
            world,
            resume=resume,
            overwrite=overwrite,
            quiet=quiet,
            console=console,
            metadata=metadata,
        ).run()


class Trainer:
    """One run on this process; ``run`` is the loop."""

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        resume: str | Path | None = None,
        overwrite: bool = False,
        quiet: bool = False,
        console: Console | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        self.world = world
        self.metadata = metadata
        self.folder = Path(config.run_folder)
        self.show = Progress(world.first and not quiet, console)
        checkpoint = None if resume is None else find_checkpoint(resume, self.folder)
        if not overwrite:
            refuse_another_run(self.folder, checkpoint)
        world.barrier()  # nobody writes before everybody has looked
        self.parts: Setup = set_up(config, self.folder, checkpoint, world)
        self.config = self.parts.config
        self.state = self.parts.state
        self.last_checkpoint = checkpoint
        self.loss: float | None = None
        self.validation: Evaluation | None = None
        self.core: float | None = None
        if world.first:
            with writing(self.folder):
                for line in make_room(self.folder, checkpoint):
                    self.show.message(line)
                save_config(self.config, self.folder / RUN_CONFIG)
                write_environment(self.folder, world, self.state.step)
            self.metrics = Metrics(self.folder, self.state.step)
        self._say_what_begins(checkpoint)

    def run(self) -> TrainResult:
        """Train to the end, or until time is up or a signal asks to stop; then evaluate and save."""
        parts, state, world, training = self.parts, self.state, self.world, self.config.training
        clock = Clock(state.elapsed)
        with self.show, stop_request() as request:
            if state.step == 0 and 0 in parts.scheduled:
                self._save()
            while (stopped := self._stopped(request, clock)) is None:
                progress = progress_of(state.step, parts.steps, state.elapsed, training.minutes)
                batches = parts.batches(world, self._length(progress))
                n_targets, n_tokens, n_bytes = world.sums(self._counts(batches))
                scale = lr_scale(training, parts.steps, state.step, progress)
                parts.optimizer.set_lr(scale)
                parts.optimizer.set_decay(decay_scale(training, progress))
                parts.optimizer.set_momentum(muon_momentum(training, state.step, progress))
                update = self._step(batches, int(n_targets))
                state.skipped = state.skipped + 1 if update.skipped and not update.overflowed else 0
                state.step += 1
                state.sample = parts.loader.index
                state.tokens += int(n_tokens)
                rate = clock.rate(int(n_tokens))
                self._log(update, n_bytes, scale * training.lr, rate, clock.elapsed)
                if state.step < parts.steps:  # what is due at the end is done there
                    self._every(training.eval_every, self._evaluate, clock)
                    self._every(training.core_every, self._core, clock)
                    self._every(training.sample_every, self._sample, clock)
                    if state.step in parts.scheduled:
                        self._every(1, self._save, clock)
                    else:
                        self._every(training.checkpoint_every, self._save, clock)
            self._finish(stopped, request.name)
        return TrainResult(
            run=self.folder,
            checkpoint=self.last_checkpoint,
            step=state.step,
            tokens=state.tokens,
            elapsed=state.elapsed,
            loss=self.loss,
            validation=self.validation,
            stopped=stopped,
            model=parts.model.eval(),
            tokenizer=parts.tokenizer,
            core=self.core,
        )

    def _stopped(self, request: StopRequest, clock: Clock) -> Stopped | None:
        """Why the run ends before its next step, if it does; the same on every process."""
        asked, elapsed = self.world.sums(
            [request.name is not None, clock.elapsed if self.world.first else 0.0]
        )
        self.state.elapsed = elapsed
        minutes = self.config.training.minutes
        if self.state.step >= self.parts.steps:
            return "steps"
        if asked:
            return "signal"
        return "time" if minutes is not None and elapsed >= 60.0 * minutes else None

    def _length(self, progress: float) -> int | None:
        """Tokens a sequence, if rows are to be cut."""
        longest = self.config.data.sequence_length
        length = sequence_length(self.config.training, longest, progress)
        return None if length == longest else length

    def _counts(self, batches: list[Batch]) -> list[float]:
        """Targets, tokens, and bytes of text that the targets stand for, of this process."""
        real = [batch for batch in batches if batch.n_targets]
        n_bytes = sum(target_bytes(self.parts.objective, batch, self.parts.token_bytes) for batch in real)
        return [sum(batch.n_targets for batch in real), sum(batch.n_tokens for batch in real), n_bytes]

    def _step(self, batches: list[Batch], n_targets: int) -> Update:
        parts, training = self.parts, self.config.training
        try:
            return train_step(
                parts.forward,
                parts.objective,
                parts.optimizer,
                batches,
                n_targets,
                training,
                parts.scaler,
                self.world,
                self.state.skipped < training.skip_nonfinite,
            )
        except NotFinite as error:
            raise TrainingError(
                f"{error} at step {self.state.step + 1}: training stopped before any weight took it on; "
                f"{self._way_back('--training.lr=' + format(training.lr / 2, 'g'))}"
            ) from None
        except torch.OutOfMemoryError as error:
            tokens = max(batch.n_tokens for batch in batches)
            raise TrainingError(
                f"out of memory with {tokens} tokens a forward: set --training.micro_batch_tokens="
                f"{tokens // 2} (the same step, in smaller parts) or --training.activation_checkpointing=true"
            ) from error

    def _log(self, update: Update, n_bytes: float, lr: float, rate: float, elapsed: float) -> None:
        state, steps, training = self.state, self.parts.steps, self.config.training
        if not math.isfinite(update.loss):
            self.show.message(f"step {state.step} was left out: the loss is {update.loss}")
            return
        if update.skipped and not update.overflowed:
            self.show.message(
                f"step {state.step} was left out: the norm of the gradient is {update.grad_norm}"
            )
        self.loss = update.loss
        bits = update.loss * update.n_targets / (math.log(2) * n_bytes) if n_bytes else None
        line = state.step % training.log_every == 0 or state.step in (1, steps)
        progress = progress_of(state.step, steps, elapsed, training.minutes)
        known = None if training.minutes else steps
        self.show.step(Status(state.step, known, progress, update.loss, bits, lr, rate, elapsed), line=line)
        if line and self.world.first:
            self.metrics.write(
                {
                    "kind": "train",
                    "step": state.step,
                    "tokens": state.tokens,
                    "loss": update.loss,
                    "bits_per_byte": bits,
                    "lr": lr,
                    "grad_norm": None if update.skipped else update.grad_norm,
                    "tokens_per_second": rate,
                    "elapsed": elapsed,
                }
            )

    def _every(self, steps: int, action: Callable[[], None], clock: Clock) -> None:
        if steps and self.state.step % steps == 0:
            action()
            clock.pause()

    def _evaluate(self) -> None:
        parts, state = self.parts, self.state
        if parts.validation is None:
            return
        batches = parts.evaluation(self.world)
        result = evaluate(
            parts.model,
            parts.forward,
            parts.objective,
            batches,
            parts.token_bytes,
            self.config.training,
            self.world,
        )
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"the loss on held-out data is {result.loss} at step {state.step}: the weights are damaged; "
                f"{self._way_back()}"
            )
        self.validation = result
        if not state.best or result.loss < state.best["loss"]:
            state.best = {"step": state.step, "loss": result.loss}
        self.show.evaluation(state.step, result)
        if self.world.first:
            self.metrics.write(
                {"kind": "evaluation", "step": state.step, "tokens": state.tokens, **asdict(result)}
            )

    def _core(self) -> None:
        parts, state = self.parts, self.state
        if not parts.core_tasks:
            return
        scores = ask_tasks(parts.model, parts.tokenizer, parts.core_tasks, self.config.training, self.world)
        record = core_record(scores)
        self.core = record["core"]
        self.show.core(state.step, record)
        if self.world.first:
            self.metrics.write({"step": state.step, "tokens": state.tokens, **record})

    def _sample(self) -> None:
        parts = self.parts
        made = write_samples(
            parts.model, parts.tokenizer, self.config.training, self.folder, self.state.step, self.world
        )
        self.show.samples(self.state.step, made)

    def _save(self) -> None:
        parts = self.parts
        self.state.scaler = parts.scaler.state()
        try:
            self.last_checkpoint = save_checkpoint(
                self.folder,
                parts.model,
                self.config,
                parts.tokenizer,
                parts.optimizer,
                self.state,
                self.world,
                self.config.training.keep_checkpoints,
                self.parts.scheduled,
                None if self.metadata is None else self.metadata(self.state, parts.loader.samples.count),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._way_back()}") from error

    def _finish(self, stopped: Stopped, signal_name: str | None) -> None:
        newest = self.folder / CHECKPOINTS / checkpoint_name(self.state.step)
        saved = self.last_checkpoint is not None and self.last_checkpoint.resolve() == newest.resolve()
        if stopped != "signal":
            self._evaluate()
            self._core()
            if self.config.training.sample_every:
                self._sample()
        if not saved:
            self._save()
        why = {
            "steps": "all steps done",
            "time": "time is up",
            "signal": f"stopped by {signal_name or 'a signal'}",
        }
        more = "" if stopped == "steps" else f"; go on with: plait train --resume {self.folder}"
        self.show.message(
            f"{why[stopped]}: step {self.state.step} after {duration(self.state.elapsed)}, "
            f"saved in {self.last_checkpoint}{more}"
        )

    def _way_back(self, advice: str = "") -> str:
        if self.last_checkpoint is None:
            return "there is no checkpoint yet: begin again" + (f", perhaps with {advice}" if advice else "")
        command = f"plait train --resume {self.last_checkpoint}"
        return f"the last good checkpoint is {self.last_checkpoint}; go on from it with: {command}" + (
            f" {advice}" if advice else ""
        )

    def _say_what_begins(self, checkpoint: Path | None) -> None:
        parts, say = self.parts, self.show.message
        n_parameters = sum(p.numel() for p in parts.optimizer.parameters)
        minutes = self.config.training.minutes
        length = f"{minutes:g} minutes of steps" if minutes else counted(parts.steps, "step")
        length += f" ({parts.horizon.reason})" if parts.horizon.reason else ""
        say(
            f"{self.folder}: {n_parameters:,} parameters on {self.world.device} x {self.world.size}, "
            f"{counted(parts.loader.samples.count, 'row')} of training data, {length} of "
            f"{counted(parts.loader.batch_rows, 'row')}"
        )
        dtype = product_dtype(self.config.training.precision, self.world.device)
        say(f"products in {str(dtype).removeprefix('torch.')}")
        say("optimizer: " + ", ".join(parts.optimizer.describe()))
        if parts.scheduled:
            kept = sorted(parts.scheduled)
            say(f"{len(kept)} of the checkpoints are kept: after steps {_listed(kept)}")
        if checkpoint is None:
            if self.config.training.init_from is not None:
                say(f"weights and tokenizer are at first those of {self.config.training.init_from}")
            return
        say(f"resumed at step {self.state.step} from {checkpoint}")
        before = _named(load_config(checkpoint / RUN_CONFIG))
        for path, there, here in differences(before, _named(self.config)):
            say(f"changed: {dotted(path)} was {show(there)}, is now {show(here)}")


def _named(config: Config) -> dict[str, Any]:
    """Its values with the folder of the run, which need not be said."""
    return config.replace(training=config.training.replace(out=config.run_folder)).to_dict()


def _listed(steps: list[int]) -> str:
    """The first and the last of many steps, for people."""
    shown = [*map(str, steps[:6]), "...", *map(str, steps[-2:])] if len(steps) > 9 else [*map(str, steps)]
    return ", ".join(shown)
