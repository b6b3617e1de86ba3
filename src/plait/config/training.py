"""A training run as data: how long, which objective, optimizer, schedule, what is written when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from plait.config.errors import ConfigError
from plait.config.optimizer import GroupConfig, MuonConfig, check_betas
from plait.config.section import Section
from plait.config.timetable import CheckpointSchedule, SequenceStage, check_stages


class TrainingConfig(Section):
    """How a model is trained."""

    objective: Literal["causal_lm", "masked_lm", "classification", "chat"] = Field(
        "causal_lm", description="what is learnt; chat: what the assistant says in conversations"
    )
    init_from: str | None = Field(
        None, description="a run, checkpoint or saved model whose weights and tokenizer the run begins with"
    )
    steps: int = Field(1000, gt=0, description="updates of the weights")
    minutes: float | None = Field(
        None, gt=0, description="stop after this wall time; the schedule follows it"
    )
    epochs: float | None = Field(
        None, gt=0, description="passes over the data; sets the number of steps instead"
    )
    tokens_per_parameter: float | None = Field(
        None, gt=0, description="tokens to train on for each parameter; sets the number of steps instead"
    )
    parameters_counted: Literal["all", "matrices"] = Field(
        "all",
        description="by tokens_per_parameter; matrices: those of the blocks and the output, no embeddings or vectors",
    )
    flops: float | None = Field(
        None, gt=0, description="operations of the whole run, forward and backward; sets the steps instead"
    )

    batch_tokens: int = Field(16384, gt=0, description="tokens an update, over all ranks")
    micro_batch_tokens: int | None = Field(
        None, gt=0, description="tokens a forward on one rank; null: all at once"
    )

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: matrices by Muon, the rest by AdamW"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float | None = Field(
        None, gt=0, description="peak learning rate of Muon, its updates scaled to AdamW's size; null: lr"
    )
    muon: MuonConfig = Field(default_factory=MuonConfig, description="Muon's momentum and variants")
    embedding_lr: float | None = Field(None, gt=0, description="peak learning rate of embeddings; null: lr")
    unembedding_lr: float | None = Field(
        None, gt=0, description="peak learning rate of an output map that is not tied; null: embedding_lr"
    )
    embedding_lr_width: int | None = Field(
        None,
        gt=0,
        description="embeddings' rates are for this d_model and times (d_model / it)^-0.5; null: for any",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's averages of gradient and square")
    eps: float = Field(1e-8, gt=0, description="AdamW's, added to the root of the square")
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices; embeddings and vectors have none")
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of matrices' decay: as it is, or down to 0 at the end of the run"
    )
    groups: dict[str, GroupConfig] = Field(
        default_factory=dict,
        description="by patterns of parameter names ('*.input_mix.scale'), the first that matches: lr, betas, ...",
    )
    grad_clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: any")
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="steps in a row without update where loss or gradient is not finite; 0: stop at once",
    )

    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="after warmup; wsd: constant, then down over decay_fraction"
    )
    warmup: int | float = Field(0.02, ge=0, description="steps if whole, a share of the run if below 1")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: the last share of the run, going down")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="the last learning rate as a share of the peak")

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="of matrix products; weights are fp32; auto: bf16 on a GPU that computes in it, else fp32",
    )
    tf32: bool = Field(False, description="fp32 products may use TensorFloat-32 where the device has it")
    sequence_length_schedule: list[SequenceStage] = Field(
        default_factory=list,
        description="shorter sequences early in the run; afterwards they have data.sequence_length",
    )
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="masked_lm: share of the tokens to predict")

    eval_every: int = Field(200, ge=0, description="steps between evaluations; 0: at the end alone")
    eval_tokens: int | None = Field(131072, gt=0, description="held-out tokens an evaluation; null: all")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    core_tasks: str | None = Field(
        None, description="folder of CORE's tasks (core.yaml, eval_meta_data.csv, eval_data/); null: no CORE"
    )
    core_every: int = Field(
        0, ge=0, description="steps between evaluations of CORE; 0: at the end alone, if core_tasks is named"
    )
    core_max_per_task: int | None = Field(
        None, gt=0, description="items asked of each task of CORE, always the same ones; null: all"
    )
    sample_every: int = Field(0, ge=0, description="steps between samples; 0: none")
    sample_prompts: list[str] = Field(default_factory=lambda: [""], description="what the samples begin with")
    sample_tokens: int = Field(128, gt=0, description="length of a sample")
    checkpoint_every: int = Field(500, ge=0, description="steps between checkpoints; 0: at the end alone")
    keep_checkpoints: int = Field(
        2, gt=0, description="older ones are removed, but for those of the schedule"
    )
    checkpoint_schedule: CheckpointSchedule = Field(
        default_factory=CheckpointSchedule, description="steps to save and keep, besides checkpoint_every"
    )

    out: str | None = Field(None, description="the run folder; null: runs/<experiment_name>")
    seed: int = Field(0, ge=0, description="of the weights, the order of the data, dropout and samples")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int | None = Field(None, gt=0, description="CPU threads; null: torch's choice")
    parallel: Literal["replicate", "shard"] = Field(
        "replicate", description="over ranks: whole copies, or FSDP2"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = Field(
        "none",
        description="less memory: compute each block again in backward; selective: all but scans and attention; "
        "true means block",
    )
    compile: bool = Field(False, description="torch.compile")
    deterministic: bool = Field(False, description="refuse operations whose result varies from run to run")

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """Yes and no for activation checkpointing to their modes."""
        if not isinstance(data, Mapping) or not isinstance(data.get("activation_checkpointing"), bool):
            return data
        return {**data, "activation_checkpointing": "block" if data["activation_checkpointing"] else "none"}

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        check_betas(self.betas)
        horizons = [n for n in ("epochs", "tokens_per_parameter", "flops") if getattr(self, n) is not None]
        if len(horizons) > 1:
            raise ConfigError(
                f"{' and '.join(horizons)} each set the number of steps; keep one", (horizons[1],)
            )
        try:
            check_stages(self.sequence_length_schedule)
        except ConfigError as error:
            raise error.below("sequence_length_schedule") from None
        if self.sequence_length_schedule and self.objective in ("classification", "chat"):
            raise ConfigError(
                f"{self.objective} reads whole texts; leave it out", ("sequence_length_schedule",)
            )
        if self.warmup >= 1 and not float(self.warmup).is_integer():
            raise ConfigError(
                f"expected a whole number of steps, or a share of the run below 1; got {self.warmup}",
                ("warmup",),
            )
        if self.core_every and self.core_tasks is None:
            raise ConfigError(
                f"core_every is {self.core_every}, but no folder of CORE's tasks is named: set "
                "--training.core_tasks=FOLDER (core.yaml, eval_meta_data.csv, eval_data/), or core_every to 0",
                ("core_tasks",),
            )
        if self.core_tasks is not None and self.objective not in ("causal_lm", "chat"):
            raise ConfigError(f"CORE asks causal language models, not {self.objective}", ("core_tasks",))
        if self.micro_batch_tokens is not None and self.micro_batch_tokens > self.batch_tokens:
            raise ConfigError(
                f"expected at most batch_tokens, {self.batch_tokens}; got {self.micro_batch_tokens}",
                ("micro_batch_tokens",),
            )
        return self
