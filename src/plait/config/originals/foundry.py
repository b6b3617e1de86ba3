"""Model Foundry's experiment YAML in our schema: what each of its fields does here.

data          training_corpus (else source_corpus) is trained on, test_corpus evaluated; without one nothing is
              held out. A step takes batch_size x gradient_accumulation_steps sequences.
tokenizer     output_dir is a trained tokenizer; without it one is trained and kept in the run's folder
model         a preset's model. Mamba: LayerNorm before each mixer, dropout of what a mixer adds, tied output
training      AdamW with torch's weight decay of 0.01, linear decay to 0; train_steps, or else epochs; a step is an
              update of the weights. use_amp: bfloat16. Without a schedule of checkpoints: Plait's own
logging       log_metrics_every_n_steps. Everything else is for its own log files: see LOG_FILES
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.config.errors import ConfigError, nearest
from plait.config.explain import show
from plait.config.originals.foundry_schema import (
    OWN_ARCHITECTURES,
    ExperimentConfig,
    LoggingConfig,
    ModelConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerModelConfig,
)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
TOKENIZERS = {
    "sentencepiece": "sentencepiece",
    "wordpiece": "wordpiece",
    "bpe": "bpe",
    "character": "characters",
}
_ANGLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_BARS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
# What plays each role in a tokenizer of Plait's; special_tokens may say the same.
SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "sentencepiece": _ANGLES,
    "wordpiece": {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
    },
    "bpe": _BARS,
    "character": {**_BARS, "unk_token": "<|unk|>"},
}
# Fields about log files of Foundry's own, which its `run` command writes (plait.compat.foundry) and `plait train` not.
LOG_FILES = (
    "console_level",
    "file_level",
    "level",
    "dir",
    "use_structured_logging",
    "max_log_files",
    "max_log_size_mb",
)
_NEVER_LOGGED = {
    "use_wandb": "nothing is sent to Weights & Biases; the metrics are in metrics.jsonl of the run's folder",
    "log_detailed_metrics_every_n_steps": "every line of metrics.jsonl has all metrics",
    "profile_performance": "there is no profiler in a run; see plait train --dry-run",
    "log_memory_every_n_steps": "memory is not logged; plait estimate tells it beforehand",
    "max_errors_to_track": "a run stops at its first error",
}


def recognise(values: Mapping[str, Any]) -> bool:
    """A Foundry config names its model's ``architecture``, a key that no model of ours has."""
    model = values.get("model")
    return isinstance(model, Mapping) and "architecture" in model


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same run in our schema; ConfigError naming the field for whatever ``plait train`` cannot do of it."""
    experiment = ExperimentConfig.model_validate(values)
    defaults = LoggingConfig()
    for name in LOG_FILES:
        if getattr(experiment.logging, name) != getattr(defaults, name):
            raise ConfigError(
                "it is about Foundry's own log files, which only python -m plait.compat.foundry.cli run writes; "
                "leave it out",
                ("logging", name),
            )
    if experiment.training.resume_from_checkpoint:
        raise ConfigError(
            "it is not a property of the run: say plait train CONFIG --resume",
            ("training", "resume_from_checkpoint"),
        )
    return run_values(experiment)


def run_values(experiment: ExperimentConfig) -> dict[str, Any]:
    """As ``translate``, of a validated experiment whose caller takes care of the log files and of resuming."""
    _refuse_what_is_not_there(experiment)
    data, training = experiment.data, experiment.training
    row = experiment.batch_size * data.max_sequence_length
    passes = training.gradient_accumulation_steps
    return {
        "experiment_name": experiment.experiment_name,
        "model": _own(experiment)
        if experiment.model.architecture in OWN_ARCHITECTURES
        else model_values(experiment.model, data.max_sequence_length, training.objective),
        "tokenizer": _tokenizer(experiment.tokenizer),
        "data": {
            "train": data.source_corpus if data.training_corpus is None else data.training_corpus,
            "validation": data.test_corpus,
            "validation_fraction": 0.0,
            "sequence_length": data.max_sequence_length,
        },
        "training": {
            "batch_tokens": row * passes,
            "micro_batch_tokens": row if passes > 1 else None,
            "seed": experiment.random_seed,
            "log_every": experiment.logging.log_metrics_every_n_steps,
            **_training(training),
        },
    }


def model_values(model: ModelConfig, max_length: int, objective: str | None = None) -> dict[str, Any]:
    """The model, raw, without a vocabulary; ``objective`` None: what suits the architecture."""
    two_way = model.architecture == "bert" or (model.rnn is not None and model.rnn.bidirectional)
    if two_way and objective == "causal_lm":
        raise ConfigError(
            f"causal_lm is not for a model that reads both ways ({model.architecture}): it would see the token it "
            "predicts; use masked_lm",
            ("training", "objective"),
        )
    masked = two_way if objective is None else objective == "masked_lm"
    head: dict[str, Any] = {"kind": "masked_lm" if masked else "lm"}
    if model.transformer is not None:
        return _transformer(model, model.transformer, max_length, head)
    if model.rnn is not None:
        rnn = model.rnn
        return {
            "preset": model.architecture,
            "d_model": rnn.hidden_size * (2 if rnn.bidirectional else 1),
            "n_layer": rnn.num_layers,
            "causal": not rnn.bidirectional,
            "vocab_size": None,
            "dropout": rnn.dropout,
            "embedding": {"width": rnn.embedding_size},
            "head": {**head, "tie": False, "bias": True},
            model.architecture: {"d_hidden": rnn.hidden_size, "bidirectional": rnn.bidirectional},
        }
    assert model.mamba is not None
    mamba = model.mamba
    return {
        "d_model": mamba.d_model,
        "n_layer": mamba.n_layers,
        "pattern": "mamba",
        "norm": {"kind": "layer", "place": "pre"},
        "mlp": "none",
        "dropout": mamba.dropout,
        "head": {**head, "tie": True},
        "mamba": {"d_state": mamba.d_state, "d_conv": mamba.d_conv, "expand": mamba.expand},
    }


def _own(experiment: ExperimentConfig) -> dict[str, Any]:
    """An architecture that a user registered: one layer that turns ids into logits, and nothing around it.

    It is built from what of the experiment makes a model; the rest may change when a run goes on.
    """
    objective = experiment.training.objective
    about = {
        "model": experiment.model.model_dump(mode="json"),
        "data": {"max_sequence_length": experiment.data.max_sequence_length},
        "training": {"objective": objective},
    }
    masked = objective == "masked_lm"
    return {
        "d_model": 1,
        "n_layer": 1,
        "pattern": [{"mixer": OWN_ARCHITECTURES[experiment.model.architecture], "config": about}],
        "causal": not masked,
        "norm": "none",
        "final_norm": "none",
        "residual": "none",
        "mlp": "none",
        "head": {"kind": "masked_lm" if masked else "lm", "project": False, "tie": False},
    }


def _transformer(
    model: ModelConfig, given: TransformerModelConfig, max_length: int, head: dict[str, Any]
) -> dict[str, Any]:
    if given.embedding_size != given.hidden_size:
        raise ConfigError(
            f"embedding_size {given.embedding_size} and hidden_size {given.hidden_size} differ, but a "
            f"{model.architecture} has one width; make them equal",
            ("model", "transformer"),
        )
    name = given.activation_function.lower()
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"expected one of {', '.join(ACTIVATIONS)}; got {show(given.activation_function)}"
            f"{nearest(name, ACTIVATIONS)}",
            ("model", "transformer", "activation_function"),
        )
    kind = ACTIVATIONS[name]
    embedding: dict[str, Any] = {"max_positions": max_length, "dropout": given.dropout}
    if model.architecture == "bert":
        head = {**head, "transform": kind}
        embedding["token_types"] = 2 if model.bert is None else model.bert.type_vocab_size
    return {
        "preset": model.architecture,
        "d_model": given.hidden_size,
        "n_layer": given.layers,
        "vocab_size": None,
        "mlp": {"kind": kind, "width": given.intermediate_hidden_size, "bias": True},
        "dropout": given.dropout,
        "embedding": embedding,
        "head": {**head, "tie": True, **({"bias": True} if model.architecture == "bert" else {})},
        "attention": {"n_head": given.attention_heads, "attn_dropout": given.attention_dropout},
    }


def _tokenizer(given: TokenizerConfig) -> dict[str, Any]:
    usual = SPECIAL_TOKENS[given.tokenizer_type]
    for role, name in (given.special_tokens or {}).items():
        if usual.get(role) != name:
            known = ", ".join(f"{key} {value}" for key, value in usual.items())
            raise ConfigError(
                f"the special tokens of a {given.tokenizer_type} tokenizer are {known}; got {show(name)}, leave it out",
                ("tokenizer", "special_tokens", role),
            )
    told = given.tokenizer_type != "character" or "vocab_size" in given.model_fields_set
    return {
        "type": TOKENIZERS[given.tokenizer_type],
        "path": given.output_dir,
        # characters take all there are, unless told
        "vocab_size": given.vocab_size if told else None,
    }


def _training(given: TrainingConfig) -> dict[str, Any]:
    lengths = {"steps": given.train_steps, "epochs": given.epochs if given.train_steps is None else None}
    return {
        **{name: value for name, value in lengths.items() if value is not None},
        "objective": given.objective,
        "mlm_probability": given.mlm_probability if given.objective == "masked_lm" else 0.15,
        "out": given.output_dir,
        "optimizer": "adamw",
        "lr": given.learning_rate,
        "betas": [given.adam_beta1, given.adam_beta2],
        "eps": given.adam_epsilon,
        "weight_decay": 0.01,
        "grad_clip": given.max_grad_norm,
        "schedule": "linear",
        "min_lr_ratio": 0.0,
        "warmup": given.warmup_ratio if given.warmup_steps is None else given.warmup_steps,
        "precision": "bf16" if given.use_amp else "fp32",
        "tf32": given.use_tf32,
        "activation_checkpointing": given.use_gradient_checkpointing,
        **_checkpoints(given),
    }


def _checkpoints(given: TrainingConfig) -> dict[str, Any]:
    if given.checkpoint_schedule:
        return {"checkpoint_every": 0, "checkpoint_schedule": given.checkpoint_schedule}
    if not given.auto_generate_checkpoints:
        return {}
    return {
        "checkpoint_every": 0,
        "checkpoint_schedule": {
            "first_epoch": given.first_epoch_checkpoints,
            "later_epochs": given.subsequent_epochs_spacing,
            "base": given.log_base,
            "interval": given.linear_interval,
            "min_interval": given.min_checkpoint_interval,
            "min_per_epoch": given.min_checkpoints_per_epoch,
        },
    }


def _refuse_what_is_not_there(experiment: ExperimentConfig) -> None:
    logging, training, model = experiment.logging, experiment.training, experiment.model
    usual = LoggingConfig()
    for name, reason in _NEVER_LOGGED.items():
        if getattr(logging, name) != getattr(usual, name):
            raise ConfigError(f"{reason}; leave it out", ("logging", name))
    if training.checkpointing_strategy is not None:
        raise ConfigError(
            "it never did anything in Foundry; say checkpoint_schedule or auto_generate_checkpoints",
            ("training", "checkpointing_strategy"),
        )
    if training.warmup_steps is None and training.warmup_ratio >= 1:
        raise ConfigError(
            f"expected a share of the run below 1; got {training.warmup_ratio:g}",
            ("training", "warmup_ratio"),
        )
    if training.objective == "masked_lm" and not 0 < training.mlm_probability < 1:
        raise ConfigError(
            f"expected more than 0 and less than 1; got {training.mlm_probability:g}",
            ("training", "mlm_probability"),
        )
    own = model.architecture in OWN_ARCHITECTURES  # it may read any section
    needed = (model.section_name, "bert") if model.architecture == "bert" else (model.section_name,)
    for name in ("transformer", "bert", "rnn", "mamba", "parameters"):
        if getattr(model, name) and name not in needed and not own:
            raise ConfigError(
                f"the architecture is {model.architecture}, which has no such section", ("model", name)
            )
    if model.bert is not None and model.bert.pooler_type != "first":
        raise ConfigError(
            "a masked language model has no pooler; leave it out", ("model", "bert", "pooler_type")
        )
    if experiment.dataset_manipulation and experiment.data.training_corpus is None:
        raise ConfigError(
            "Plait does not make the changed text; name it as data.training_corpus, made by Foundry's own preprocess",
            ("dataset_manipulation",),
        )
