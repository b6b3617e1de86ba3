"""What midtraining and fine-tuning share: a trained model goes on with conversations.

The conversations are lines of JSONL or rows of Parquet, {"messages": [...]}: --data.train names them, else they are in
nanochat's folder. Rows hold as many whole conversations as fit, and what the assistant says is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from plait.compat.nanochat.checkpoint_manager import SOURCES, plait_folder
from plait.compat.nanochat.common import get_base_dir
from plait.compat.nanochat.configurator import read_command_line
from plait.config.lazy import load_object
from plait.config.load import load_config
from plait.config.originals.nanochat import BaseTrain, translate
from plait.config.section import Section
from plait.formats.folders import CHECKPOINTS
from plait.formats.native import read_model_config

DATA = "conversations"


class FineTuning(Section):
    """The settings of both, under nanochat's names."""

    run: str = Field("dummy", description="names the run; dummy: the model's tag does")
    source: str = Field("base", description="the stage that the model comes from: base, mid, sft")
    model_tag: str | None = Field(None, description="which model; None: the largest")
    step: int | None = Field(None, description="its step; None: the last")
    device_type: str = Field("", description="cuda, cpu or mps; empty: the best there is")
    max_seq_len: int = Field(2048, gt=0, description="tokens a row")
    device_batch_size: int = Field(32, gt=0, description="rows of a forward on one device")
    total_batch_size: int = Field(524288, gt=0, description="tokens of a step")
    num_epochs: float = Field(1, gt=0, description="passes over the conversations")
    num_iterations: int = Field(-1, description="steps; -1: by num_epochs")
    embedding_lr: float = Field(0.2, gt=0, description="of the embedding, at width 768")
    unembedding_lr: float = Field(0.004, gt=0, description="of the output, at width 768")
    matrix_lr: float = Field(0.02, gt=0, description="of the matrices, by Muon")
    weight_decay: float = Field(0.0, ge=0, description="of embedding and output")
    init_lr_frac: float = Field(1.0, gt=0, description="share of these rates to begin with")
    warmdown_ratio: float = Field(
        0.2, gt=0, le=1, description="share of the run in which the rates go down to 0"
    )
    eval_every: int = Field(150, description="steps between evaluations; -1: at the end alone")
    allow_pickle: bool = Field(False, description="whether a tokenizer.pkl of nanochat's may be opened")
    resume: str | None = Field(None, description="go on: auto for this run's newest checkpoint, or a folder")
    overwrite: bool = Field(False, description="begin anew in a folder that holds a run")
    dry_run: bool = Field(False, description="only show what the run would take")


_RATES = ("embedding_lr", "unembedding_lr", "matrix_lr")
_SHARED = (
    "device_type",
    "max_seq_len",
    "device_batch_size",
    "total_batch_size",
    "weight_decay",
    "warmdown_ratio",
)


def fine_tune(words: Sequence[str], settings: type[FineTuning], stage: str) -> int:
    """Train as a command line says, and leave the run in the folder of ``stage``; the exit status."""
    line = read_command_line(words, settings)
    given = settings.model_validate(line.settings)
    with plait_folder(given.source, given.model_tag, given.step, allow_pickle=given.allow_pickle) as model:
        values = run_values(given, model, stage)
        config = load_config(values, line.overrides)
        status: int = load_object("plait.cli.train:launch")(
            config, resume=given.resume, overwrite=given.overwrite, dry_run=given.dry_run
        )
    return status


def run_values(given: FineTuning, model: Path, stage: str) -> Mapping[str, Any]:
    """The run in our schema: nanochat's rates times ``init_lr_frac``, the model and its tokenizer from ``model``."""
    base = BaseTrain.model_validate(
        {name: getattr(given, name) for name in (*_SHARED, "eval_every")}
        | {name: getattr(given, name) * given.init_lr_frac for name in _RATES}
        | {"num_iterations": max(1, given.num_iterations)}
    )
    values = translate(base.model_dump(exclude_unset=True))
    training = values["training"] | {"objective": "chat", "init_from": str(model), "sample_every": 0}
    if given.num_iterations <= 0:
        del training["steps"]
        training["epochs"] = given.num_epochs
    name = given.model_tag or _tag(model) if given.run in ("", "dummy") else given.run
    training["out"] = str(get_base_dir() / SOURCES[stage] / name)
    data: dict[str, Any] = {"sequence_length": given.max_seq_len}
    if (get_base_dir() / DATA).is_dir():
        data["train"] = str(get_base_dir() / DATA)
    return {"experiment_name": name, "data": data, "training": training}


def _tag(model: Path) -> str:
    """The name of the run that a checkpoint lies in; d<depth> for another folder."""
    if model.parent.name == CHECKPOINTS:
        return model.parent.parent.name
    return f"d{len(read_model_config(model).layers())}"
