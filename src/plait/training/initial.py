"""Fine-tuning: a run that begins with the weights and the tokenizer of a trained model (``training.init_from``).

The model is the one that was saved: a config that says nothing of a model takes it over, another one must agree. The
tokenizer too; learning conversations gives it the tokens that it lacks, and the model a row for each of them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from plait.config.data import TokenizerConfig
from plait.config.errors import CheckpointError, TrainingError
from plait.config.load import load_config
from plait.config.schema import Config, ModelConfig
from plait.formats.folders import RUN_CONFIG, TOKENIZER, find_model_folder, list_checkpoints
from plait.formats.native import load_saved_tokenizer, load_weights, read_model_config, unfilled_model
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.chat import CHAT_TOKENS, with_chat_tokens
from plait.tokenizers.load import load_tokenizer
from plait.training.resume import refuse_other_model


def with_initial(config: Config, checkpoint: Path | None) -> Config:
    """The config with what ``training.init_from`` decides filled in: the folder, the model, the tokenizer's place.

    A resumed run takes them from its own checkpoint, so that the model it began with may be gone.
    CheckpointError if there is no such model; TrainingError if the config describes another one.
    """
    source = config.training.init_from
    if source is None:
        return config
    if checkpoint is not None:
        before = load_config(checkpoint / RUN_CONFIG)
        training = config.training.replace(init_from=before.training.init_from)
        config = _filled(config.replace(training=training), before.model, before.tokenizer)
        size = config.model.vocab_size or before.model.vocab_size
        return config.replace(model=config.model.replace(vocab_size=size))
    try:
        folder = find_model_folder(Path(source))
        model = read_model_config(folder)
        tokenizer = load_saved_tokenizer(folder)
    except CheckpointError as error:
        raise CheckpointError(f"training.init_from: {error}") from error
    place = TokenizerConfig()
    if tokenizer is not None:
        place = TokenizerConfig(type=tokenizer.type, path=str(folder / TOKENIZER))
    config = config.replace(training=config.training.replace(init_from=str(folder)))
    config = _filled(config, model.replace(vocab_size=None), place)
    advice = "leave the section model out to take it over"
    try:
        refuse_other_model(folder, config.model.replace(vocab_size=model.vocab_size), advice)
    except CheckpointError as error:
        raise TrainingError(f"training.init_from: {error}") from error
    return config


def _filled(config: Config, model: ModelConfig, tokenizer: TokenizerConfig) -> Config:
    """A config whose model and tokenizer are the given ones, where it has only the defaults."""
    return config.replace(
        model=model if config.model == ModelConfig() else config.model,
        tokenizer=tokenizer if config.tokenizer == TokenizerConfig() else config.tokenizer,
    )


def initial_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run with ``training.init_from``: the model's own, whatever else the config names.

    TrainingError if the config names one with other ids.
    """
    assert config.training.init_from is not None
    folder = Path(config.training.init_from)
    own = load_saved_tokenizer(folder)
    chosen = load_tokenizer(config.tokenizer)
    accepted = [own] if own is not None else [chosen]
    if own is not None and CHAT_TOKENS[0] in chosen.special_tokens:
        accepted.append(with_chat_tokens(own))
    if chosen.fingerprint() not in [tokenizer.fingerprint() for tokenizer in accepted]:
        raise TrainingError(
            f"training.init_from: the model in {folder} reads the ids of its own {accepted[0].type} tokenizer, and the "
            "section tokenizer names another one; leave that out to take the model's over"
        )
    return chosen


def known_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of a new run, or None if it is to be trained on the data first."""
    if config.training.init_from is not None:
        tokenizer = initial_tokenizer(config)
    elif config.tokenizer.type == "bytes" or config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        return None
    return with_chat_tokens(tokenizer) if config.training.objective == "chat" else tokenizer


def initial_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with ``model.vocab_size`` filled in: the tokenizer's, or the saved model's if that is more."""
    if config.model.vocab_size is not None:
        return config
    size = tokenizer.vocab_size
    if config.training.init_from is not None:
        size = max(size, read_model_config(Path(config.training.init_from)).vocab_size or 0)
    return config.replace(model=config.model.replace(vocab_size=size))


def begun_config(config: Config, resume: bool = False) -> Config:
    """The config as its run will save it, as far as that is known before data is read.

    resume: the run goes on from its newest checkpoint, if there is one.
    """
    checkpoints = list_checkpoints(Path(config.run_folder)) if resume else []
    if checkpoints:
        return with_initial(config, checkpoints[-1])
    config = with_initial(config, None)
    tokenizer = known_tokenizer(config)
    return config if tokenizer is None else initial_vocabulary(config, tokenizer)


def initial_model(config: Config) -> Model:
    """The saved model on the host, its vocabulary as large as the config's; new rows are drawn by ``training.seed``."""
    assert config.training.init_from is not None and config.model.vocab_size is not None
    folder = Path(config.training.init_from)
    model = unfilled_model(read_model_config(folder))
    load_weights(model, folder)
    if model.vocab_size != config.model.vocab_size:
        torch.manual_seed(config.training.seed)
        model.resize_token_embeddings(config.model.vocab_size)
    return model
