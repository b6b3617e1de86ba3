"""All that a run needs, built in order: tokenizer, data, objective, model, optimizer; or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from plait.config.data import DataConfig
from plait.config.errors import TrainingError
from plait.config.schema import Config
from plait.data.batch import Batch
from plait.data.conversations import conversation_texts
from plait.data.documents import read_documents
from plait.data.loader import Loader, without_targets
from plait.data.shards import TokenShards
from plait.evaluation.core import CoreTask
from plait.formats.folders import TOKENIZER
from plait.formats.native import load_weights, unfilled_model
from plait.inference.decoding import check_generates, check_positions
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.load import load_tokenizer, train_tokenizer
from plait.training import rng
from plait.training.checkpoint import RunState, load_optimizer, load_rng, read_state
from plait.training.core import open_tasks
from plait.training.distributed import World, spread
from plait.training.horizon import Horizon, horizon
from plait.training.initial import initial_model, initial_vocabulary, known_tokenizer, with_initial
from plait.training.objectives import Objective, as_tensor, make_objective
from plait.training.optimizers import Optimizer
from plait.training.precision import LossScaler
from plait.training.resume import refuse_other_model
from plait.training.timetable import Epochs, scheduled_steps
from plait.training.wrap import compile_blocks, recompute_blocks


@dataclass
class Setup:
    """A run that is ready to take its next step."""

    config: Config  # resolved: as saved, and as it would run again
    horizon: Horizon
    scheduled: frozenset[int]  # steps whose checkpoints are kept
    tokenizer: Tokenizer
    token_bytes: Tensor  # (V,) bytes of text of each id, on the host
    objective: Objective
    loader: Loader
    validation: TokenShards | None
    core_tasks: list[CoreTask]  # [] where CORE is not evaluated
    model: Model
    forward: nn.Module  # the model, or what spreads it over processes
    optimizer: Optimizer
    scaler: LossScaler
    state: RunState

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.horizon.steps

    @property
    def micro_rows(self) -> int | None:
        """Rows of a forward on one process."""
        tokens = self.config.training.micro_batch_tokens
        return None if tokens is None else max(1, tokens // self.config.data.sequence_length)

    def batches(self, world: World, length: int | None = None) -> list[Batch]:
        """This process's micro-batches of the next step; as many on every process.

        length: rows are cut into sequences of so many tokens (None: they are left whole).
        """
        batches = self.loader.micro_batches(self.micro_rows, length)
        most = -(-self.loader.batch_rows // world.size)
        wanted = 1 if self.micro_rows is None else -(-most // self.micro_rows)
        return batches + [without_targets(batches[-1])] * (wanted - len(batches))

    def evaluation(self, world: World) -> Iterator[Batch]:
        """Held-out batches."""
        assert self.validation is not None
        rows = (self.micro_rows or -(-self.loader.batch_rows // world.size)) * world.size
        return self.objective.evaluation(self.validation, rows, world.rank, world.size)


def set_up(config: Config, run: Path, checkpoint: Path | None, world: World) -> Setup:
    """Build a run from its config, or from a checkpoint of it; PlaitError for whatever does not fit."""
    config = with_initial(config, checkpoint)
    tokenizer = make_tokenizer(config, run, checkpoint, world)
    config = resolve_vocabulary(config if checkpoint else initial_vocabulary(config, tokenizer), tokenizer)
    if checkpoint is not None:
        refuse_other_model(checkpoint, config.model)
    objective = make_objective(config, tokenizer)
    core_tasks = open_tasks(config.training, world)
    shards, validation = world.first_makes(objective.open)
    shards.check_vocabulary(cast(int, config.model.vocab_size))
    state = RunState() if checkpoint is None else read_state(checkpoint)
    loader = make_loader(config, objective, shards, world, state.sample)
    model, forward = make_model(config, tokenizer, checkpoint, world)
    if core_tasks:
        check_generates(model)
    if config.training.sample_every:
        check_samples(model, tokenizer, config)
    optimizer, scaler = Optimizer(model, config.training), LossScaler(config.training.precision)
    if checkpoint is None:
        rng.seed_all(config.training.seed, world.rank, 0)
    else:
        load_optimizer(checkpoint, optimizer, world)
        load_rng(checkpoint, world, config.training.seed, state.step)
        scaler.load(state.scaler)
    rows = loader.samples.count
    length = horizon(config.training, model, config.data.sequence_length, loader.batch_rows, rows)
    assert length is not None
    kept = scheduled_steps(config.training.checkpoint_schedule, length.steps, Epochs(rows, loader.batch_rows))
    return Setup(
        config=config,
        horizon=length,
        scheduled=frozenset(kept),
        tokenizer=tokenizer,
        token_bytes=as_tensor(tokenizer),
        objective=objective,
        loader=loader,
        validation=validation,
        core_tasks=core_tasks,
        model=model,
        forward=forward,
        optimizer=optimizer,
        scaler=scaler,
        state=state,
    )


def make_tokenizer(config: Config, run: Path, checkpoint: Path | None, world: World) -> Tokenizer:
    """The checkpoint's, or the one the config names, or one trained on the text and kept in the run folder."""
    if checkpoint is not None:
        return load_tokenizer(checkpoint / TOKENIZER)
    tokenizer = known_tokenizer(config)
    if tokenizer is None:
        tokenizer = world.first_makes(lambda: _trained_tokenizer(config, run, world))
    return tokenizer


def _trained_tokenizer(config: Config, run: Path, world: World) -> Tokenizer:
    chat = config.training.objective == "chat"
    if world.first:
        wanted = config.tokenizer.replace(chat=chat or config.tokenizer.chat)
        texts = conversation_texts(config.data) if chat else _training_texts(config.data)
        train_tokenizer(wanted, texts).save(run / TOKENIZER)
    return load_tokenizer(run / TOKENIZER)


def resolve_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with ``model.vocab_size`` filled in; TrainingError if it is too small for the tokenizer."""
    given = config.model.vocab_size
    if given is None:
        model = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        return config.model_copy(update={"model": model})
    if given < tokenizer.vocab_size:
        raise TrainingError(
            f"model.vocab_size is {given}, but the {tokenizer.type} tokenizer has {tokenizer.vocab_size} "
            "ids; leave model.vocab_size out"
        )
    return config


def make_loader(
    config: Config, objective: Objective, shards: TokenShards, world: World, index: int
) -> Loader:
    """The rows of training from a global sample index on; a step takes ``batch_tokens``, in whole rows."""
    rows = config.training.batch_tokens // config.data.sequence_length
    if rows < 1:
        raise TrainingError(
            f"training.batch_tokens is {config.training.batch_tokens}, less than one row of "
            f"data.sequence_length {config.data.sequence_length}; raise one or lower the other"
        )
    return Loader(
        objective.samples(shards), rows, objective.collate, rank=world.rank, world=world.size, index=index
    )


def make_model(
    config: Config, tokenizer: Tokenizer, checkpoint: Path | None, world: World
) -> tuple[Model, nn.Module]:
    """The model, and what to call for its forward; the initial weights are the same on every device.

    Built on the host, so that no device has to hold a whole model that is then sharded.
    """
    training = config.training
    if checkpoint is None:
        with rng.preserved():
            torch.manual_seed(training.seed)
            initial = training.init_from is not None
            model = initial_model(config) if initial else Model(config.model, device="cpu")
    else:
        model = unfilled_model(config.model)
        load_weights(model, checkpoint)
    model.float().train()
    model.tokenizer = tokenizer
    blocks = list(model.blocks)
    if training.compile:
        compile_blocks(blocks)
    recompute_blocks(blocks, training.activation_checkpointing)
    return model, spread(model, blocks, training.parallel, world)


def check_samples(model: Model, tokenizer: Tokenizer, config: Config) -> None:
    """Raise before training if the samples that are asked for cannot be made after some steps."""
    check_generates(model)
    around = 4 if config.training.objective == "chat" else 1  # the special tokens of a prompt
    prompts = config.training.sample_prompts
    longest = max((len(tokenizer.encode(prompt)) + around for prompt in prompts), default=1)
    check_positions(model, longest, config.training.sample_tokens)


def _training_texts(data: DataConfig) -> Iterator[str | bytes]:
    if data.train is None:
        raise TrainingError(
            "data.train: no text is named to train on; give a file, a folder, a glob or a list of them"
        )
    by_file = data.validation_split == "last_file"
    held_out = data.validation is None and (by_file or data.validation_fraction > 0)
    documents = read_documents(
        data.train,
        data.format,
        data.field,
        split="train" if held_out else "all",
        fraction=data.validation_fraction if held_out else 0.0,
        separator=data.separator,
        validation_split=data.validation_split,
    )
    return (document.text for document in documents)
