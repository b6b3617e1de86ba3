"""metadata.json in each checkpoint of an experiment: what architectures are compared by, above all tokens so far."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from plait.compat.foundry.config import ExperimentConfig
from plait.config.errors import ConfigError
from plait.config.machine import git_commit
from plait.config.schema import Config
from plait.training.checkpoint import RunState


def checkpoint_metadata(
    experiment: ExperimentConfig, run: Config, state: RunState, rows: int
) -> dict[str, Any]:
    """Foundry's fields for a checkpoint; ``rows`` of data make an epoch.

    Tokens are those that were trained on; a step's are the whole batch's, over all processes. What an architecture
    of one's own does not tell is null, and so is ``wandb_run_id``.
    """
    training, batch = experiment.training, run.training.batch_tokens
    values = experiment.model_dump(mode="json")
    return {
        "experiment_name": experiment.experiment_name,
        "global_step": state.step,
        "epoch": max(0, state.sample - 1) // rows,  # from 0 on
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit_hash": git_commit(),
        "config_hash": hashlib.md5(
            json.dumps(values, sort_keys=True).encode(), usedforsecurity=False
        ).hexdigest(),
        "wandb_run_id": None,
        "token_metrics": {
            "total_tokens_processed": state.tokens,
            "tokens_per_step": batch,
            "effective_batch_size": batch // run.data.sequence_length,
            "sequence_length": run.data.sequence_length,
            "estimated_tokens_at_step": state.step * batch,
        },
        "training_config": {
            "learning_rate": training.learning_rate,
            "batch_size": experiment.batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "use_amp": training.use_amp,
            "use_tf32": training.use_tf32,
            "use_gradient_checkpointing": training.use_gradient_checkpointing,
        },
        "model_config": {
            "architecture": experiment.model.architecture,
            "layers": _told(experiment, "layers"),
            "hidden_size": _told(experiment, "hidden_size"),
            "attention_heads": experiment.model.attention_heads,
        },
    }


def _told(experiment: ExperimentConfig, name: str) -> int | None:
    try:
        found: int = getattr(experiment.model, name)
    except ConfigError:  # an architecture of one's own, which says so: no reason to lose a checkpoint
        return None
    return found
