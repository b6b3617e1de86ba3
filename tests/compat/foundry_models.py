"""Small experiments and models of Model Foundry's architectures, for the tests of its face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.compat.foundry.architectures import (
    BaseLanguageModel,
    BERTModel,
    GPT2Model,
    GRUModel,
    LSTMModel,
    MambaModel,
    VanillaRNNModel,
    create_model_from_config,
)
from plait.compat.foundry.config import ExperimentConfig
from tests.invariants import redraw

V = 50
MAMBA = {"d_model": 24, "n_layers": 2, "d_state": 8, "d_conv": 4, "expand": 2, "dropout": 0.1}
TRANSFORMER = {
    "layers": 2,
    "embedding_size": 24,
    "hidden_size": 24,
    "intermediate_hidden_size": 40,
    "attention_heads": 2,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
RNN = {"embedding_size": 20, "hidden_size": 24, "num_layers": 2, "bidirectional": False, "dropout": 0.1}
SECTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"transformer": TRANSFORMER},
    "bert": {"transformer": TRANSFORMER, "bert": {"type_vocab_size": 2}},
    "lstm": {"rnn": {**RNN, "rnn_type": "lstm"}},
    "gru": {"rnn": {**RNN, "rnn_type": "gru"}},
    "rnn": {"rnn": {**RNN, "rnn_type": "rnn"}},
    "mamba": {"mamba": MAMBA},
}
CLASSES: dict[str, type[BaseLanguageModel]] = {
    "gpt2": GPT2Model,
    "bert": BERTModel,
    "lstm": LSTMModel,
    "gru": GRUModel,
    "rnn": VanillaRNNModel,
    "mamba": MambaModel,
}
architectures = pytest.mark.parametrize("architecture", list(SECTIONS))


def experiment(architecture: str = "mamba", **sections: Any) -> ExperimentConfig:
    """A whole experiment with small models, as Foundry's own tests write it."""
    masked = architecture == "bert"
    values: dict[str, Any] = {
        "experiment_name": f"test_{architecture}",
        "data": {
            "source_corpus": "raw",
            "training_corpus": "text",
            "batch_size": 4,
            "max_sequence_length": 300,
        },
        "tokenizer": {"output_dir": "tok", "vocab_size": V},
        "model": {"architecture": architecture, **SECTIONS.get(architecture, {})},
        "training": {
            "output_dir": "out",
            "learning_rate": 1e-3,
            "epochs": 1,
            "objective": "masked_lm" if masked else "causal_lm",
        },
        "logging": {"console_level": "INFO", "file_level": "DEBUG", "dir": "logs"},
        "random_seed": 42,
    }
    return ExperimentConfig(**{**values, **sections})


def make(architecture: str = "mamba", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return create_model_from_config(experiment(architecture))


def drawn(architecture: str = "mamba") -> Any:
    """In evaluation mode, with weights that matter."""
    model = make(architecture).eval()
    redraw(model.model)
    return model


def tokens(rows: int = 2, length: int = 10, seed: int = 0, vocab: int = V) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def corpus(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and sleeps. " * 60)
    return path


def shrunk(folder: Path, architecture: str, **training: Any) -> ExperimentConfig:
    """A few steps on characters of a short text."""
    masked = architecture == "bert"
    return experiment(
        architecture,
        data={"training_corpus": str(corpus(folder).name), "batch_size": 4, "max_sequence_length": 32},
        tokenizer={"tokenizer_type": "character"},
        training={
            "output_dir": "out",
            "learning_rate": 1e-2,
            "train_steps": 30,
            "warmup_steps": 2,
            "objective": "masked_lm" if masked else "causal_lm",
            **training,
        },
        logging={"console_level": "ERROR", "dir": "logs", "log_metrics_every_n_steps": 1},
    )
