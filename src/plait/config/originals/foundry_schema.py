"""Model Foundry's experiment config: every field of its schema, with a default where its printed files leave it out.

Validated here in its own names; what each field means in Plait is in ``plait.config.originals.foundry``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from plait.config.errors import ConfigError, nearest
from plait.config.explain import show
from plait.config.section import Section

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
TRANSFORMERS, RECURRENT = ("gpt2", "bert"), ("lstm", "rnn", "gru")
ARCHITECTURES = (*TRANSFORMERS, *RECURRENT, "mamba")
OWN_ARCHITECTURES: dict[str, str] = {}  # those that users register, and the kinds of mixers they become


class DataConfig(Section):
    """Text and batches."""

    source_corpus: str | None = Field(None, description="the text before any manipulation")
    training_corpus: str | None = Field(None, description="the text to train on; null: source_corpus")
    test_corpus: str | None = Field(None, description="held-out text; null: none is held out")
    batch_size: int | None = Field(None, gt=0, description="sequences a forward; also under training")
    max_sequence_length: int = Field(1024, gt=0, description="tokens a sequence")


class TokenizerConfig(Section):
    """The tokenizer."""

    output_dir: str | None = Field(
        None, description="where the trained tokenizer lies; null: in the run's folder"
    )
    vocab_size: int = Field(8192, gt=0, description="ids to train for")
    tokenizer_type: Literal["sentencepiece", "wordpiece", "bpe", "character"] = Field(
        "sentencepiece", description="which kind"
    )
    special_tokens: dict[str, str] | None = Field(
        None,
        description="by role: bos_token, eos_token, unk_token, pad_token, cls_token, sep_token, mask_token",
    )


class TransformerModelConfig(Section):
    """A GPT-2 or BERT."""

    layers: int = Field(gt=0)
    embedding_size: int = Field(gt=0, description="width; of a GPT-2 the only one")
    hidden_size: int = Field(gt=0, description="width; of a BERT the only one")
    intermediate_hidden_size: int = Field(gt=0)
    attention_heads: int = Field(gt=0)
    activation_function: str = "gelu"
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    attention_dropout: float = Field(0.1, ge=0.0, lt=1.0)


class BERTSpecificConfig(Section):
    """What a BERT has besides."""

    type_vocab_size: int = Field(2, gt=0, description="Number of token types (segments)")
    pooler_type: str = Field("first", description="How to pool a sequence for classification")


class RNNModelConfig(Section):
    """An LSTM, GRU or RNN."""

    embedding_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    bidirectional: bool = Field(False, description="Read from both ends")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    rnn_type: Literal["rnn", "lstm", "gru"] | None = Field(None, description="null: as the architecture says")


class MambaModelConfig(Section):
    """A Mamba."""

    d_model: int = Field(gt=0, description="Model dimension")
    n_layers: int = Field(gt=0, description="Number of Mamba layers")
    d_state: int = Field(16, gt=0, description="SSM state expansion factor")
    d_conv: int = Field(4, gt=0, description="Local convolution width")
    expand: int = Field(2, gt=0, description="Block expansion factor")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout probability")


class ModelConfig(Section):
    """The model: an architecture and the section that describes it."""

    architecture: str = Field(description="Model architecture family")
    transformer: TransformerModelConfig | None = Field(None, description="of gpt2 and bert")
    bert: BERTSpecificConfig | None = Field(None, description="of bert, optional")
    rnn: RNNModelConfig | None = Field(None, description="of lstm, rnn and gru")
    mamba: MambaModelConfig | None = Field(None, description="of mamba")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="of an architecture of your own: what its from_config reads"
    )

    @model_validator(mode="after")
    def _has_its_section(self) -> ModelConfig:
        known = (*ARCHITECTURES, *OWN_ARCHITECTURES)
        if self.architecture not in known:
            raise ConfigError(
                f"expected one of {', '.join(known)}; got {show(self.architecture)}{nearest(self.architecture, known)}",
                ("architecture",),
            )
        section = self.section_name
        if getattr(self, section) is None:
            raise ConfigError(
                f"Architecture '{self.architecture}' requires '{section}' configuration", (section,)
            )
        told = None if self.rnn is None else self.rnn.rnn_type
        if self.architecture in RECURRENT and told not in (None, self.architecture):
            raise ConfigError(
                f"the architecture is {self.architecture}, but rnn_type {told}; keep one of them",
                ("rnn", "rnn_type"),
            )
        return self

    @property
    def section_name(self) -> str:
        """The name of the section that describes the architecture."""
        if self.architecture in OWN_ARCHITECTURES:
            return "parameters"
        if self.architecture in TRANSFORMERS:
            return "transformer"
        return "rnn" if self.architecture in RECURRENT else "mamba"

    @property
    def layers(self) -> int:
        """Number of layers, of any architecture."""
        return self._first("layers", "num_layers", "n_layers")

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, of any architecture."""
        return self._first("hidden_size", "d_model")

    @property
    def embedding_size(self) -> int:
        """Width of the token vectors, of any architecture."""
        return self._first("embedding_size", "d_model")

    @property
    def dropout(self) -> float:
        """Dropout, of any architecture."""
        return float(self._values().get("dropout", 0.0))

    @property
    def attention_heads(self) -> int | None:
        """Heads of a transformer; None for what has none."""
        return None if self.transformer is None else self.transformer.attention_heads

    @property
    def intermediate_hidden_size(self) -> int | None:
        """Width of a transformer's MLP; None for what has none."""
        return None if self.transformer is None else self.transformer.intermediate_hidden_size

    def _values(self) -> dict[str, Any]:
        if self.architecture not in OWN_ARCHITECTURES:
            values: dict[str, Any] = getattr(self, self.section_name).model_dump()
            return values
        sections = (self.transformer, self.rnn, self.mamba)  # what it may have been told in
        given = {name: value for section in sections if section for name, value in section}
        return {**given, **self.parameters}

    def _first(self, *names: str) -> int:
        values = self._values()
        for name in names:
            if name in values:
                return int(values[name])
        raise ConfigError(
            f"an architecture of your own tells this only by {' or '.join(names)}", ("parameters",)
        )


class TrainingConfig(Section):
    """The run."""

    output_dir: str | None = Field(None, description="null: runs/<experiment_name>")
    batch_size: int | None = Field(None, gt=0, description="sequences a forward; also under data")
    learning_rate: float = Field(1e-4, gt=0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-8, gt=0)
    warmup_steps: int | None = Field(None, ge=0, description="null: warmup_ratio of the run")
    train_steps: int | None = Field(
        None, gt=0, description="updates of the weights; null: as many as `epochs` take"
    )
    epochs: int | None = Field(
        None,
        gt=0,
        description="passes over the text, if train_steps is null; neither: Plait's own number of steps",
    )
    warmup_ratio: float = Field(0.1, ge=0.0, le=1.0)
    checkpointing_strategy: str | None = None
    checkpoint_schedule: list[int] | None = Field(None, description="the steps to save at")
    resume_from_checkpoint: bool = False
    objective: Literal["causal_lm", "masked_lm"] = "causal_lm"
    mlm_probability: float = Field(0.15, ge=0.0, le=1.0)
    use_amp: bool = False
    gradient_accumulation_steps: int = Field(1, gt=0)
    max_grad_norm: float | None = Field(None, gt=0)
    use_tf32: bool = True
    use_gradient_checkpointing: bool = False
    auto_generate_checkpoints: bool = Field(False, description="save by epochs, as the next values say")
    first_epoch_checkpoints: int = Field(20, gt=0)
    subsequent_epochs_spacing: Literal["log", "linear"] = "log"
    log_base: float = Field(2, gt=1)
    linear_interval: int | None = Field(None, gt=0)
    min_checkpoint_interval: int = Field(100, gt=0)
    min_checkpoints_per_epoch: int = Field(5, ge=0)


class LoggingConfig(Section):
    """What is logged, and where."""

    console_level: Level = "INFO"
    file_level: Level = "DEBUG"
    level: Level = Field("INFO", description="the older name of console_level")
    dir: str = "logs"
    use_structured_logging: bool = True
    use_wandb: bool = False
    wandb_project: str | None = None
    max_log_files: int = Field(10, gt=0)
    max_log_size_mb: int = Field(100, gt=0)
    log_metrics_every_n_steps: int = Field(10, gt=0)
    log_detailed_metrics_every_n_steps: int = Field(100, gt=0)
    profile_performance: bool = False
    log_memory_every_n_steps: int = Field(100, gt=0)
    max_errors_to_track: int = Field(1000, gt=0)


class Manipulation(Section):
    """One step of the preparation of the text, made before training by another command."""

    type: str
    input_path: str
    output_path: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class ExperimentConfig(Section):
    """An experiment: text, tokenizer, model, training, logging."""

    experiment_name: str = "experiment"
    data: DataConfig = Field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    model: ModelConfig
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    random_seed: int = Field(42, ge=0)
    dataset_manipulation: list[Manipulation] | None = None

    @model_validator(mode="after")
    def _one_batch_size(self) -> ExperimentConfig:
        here, there = self.data.batch_size, self.training.batch_size
        if here is not None and there is not None and here != there:
            raise ConfigError(
                f"batch_size is {here} under data and {there} under training; keep one", ("data",)
            )
        return self

    @property
    def batch_size(self) -> int:
        """Sequences a forward, from wherever it stands."""
        return self.data.batch_size or self.training.batch_size or DEFAULT_BATCH_SIZE


DEFAULT_BATCH_SIZE = 16
