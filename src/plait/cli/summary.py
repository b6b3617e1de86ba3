"""What ``plait train`` prints around a run: what will run, what it would take, what to do next."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from plait.cli.terminal import number, pairs, seconds, size, stdout
from plait.config.words import counted

if TYPE_CHECKING:
    from plait.config.schema import Config, TrainingConfig
    from plait.training import TrainResult


def show_run(config: Config) -> None:
    """The essentials of the run, and the stack of its model."""
    from plait.cli.source import with_vocabulary
    from plait.cli.stack import stack_of, stack_table
    from plait.models.model import Model

    described, remark = with_vocabulary(config)
    model = Model(described, device="meta")
    data, training = config.data, config.training
    stack = stack_of(model, data.sequence_length)
    vocabulary = remark or f"{config.tokenizer.path or config.tokenizer.type}, {described.vocab_size} ids"
    length = f"{training.minutes:g} minutes at most, " if training.minutes else ""
    length += _horizon(training)
    console = stdout()
    console.print(
        pairs(
            [
                ("run", config.run_folder),
                (
                    "data",
                    f"{_listed(data.train)}; rows of {data.sequence_length} tokens, documents {data.documents}",
                ),
                ("tokenizer", vocabulary),
                ("training", f"{training.objective}, {length} of {training.batch_tokens:,} tokens"),
                (
                    "optimizer",
                    f"{training.optimizer}, lr {training.lr:g}, {training.schedule}, {training.precision}, "
                    f"seed {training.seed}",
                ),
            ]
        )
    )
    console.print(stack_table(stack))


def _horizon(training: TrainingConfig) -> str:
    if training.epochs is not None:
        return counted(training.epochs, "epoch")
    if training.tokens_per_parameter is not None:
        return f"{training.tokens_per_parameter:g} tokens a parameter, in steps"
    if training.flops is not None:
        return f"{training.flops:.3g} FLOPs in steps"
    return counted(training.steps, "step")


def _listed(spec: str | list[str] | None) -> str:
    if spec is None:
        return "none yet"
    return spec if isinstance(spec, str) else ", ".join(spec)


def show_dry_run(config: Config) -> None:
    """What the run would take, on this machine."""
    from plait.training.dry_run import dry_run

    plan = dry_run(config)
    tokens = "" if plan.steps is None else f", {number(plan.steps * plan.tokens_per_step)} tokens"
    held = plan.weights + plan.gradients + plan.optimizer + plan.activations
    console = stdout()
    console.print(
        pairs(
            [
                ("parameters", ", ".join(f"{name} {number(n)}" for name, n in plan.groups.items())),
                (
                    "memory",
                    f"about {size(held)} a process: weights {size(plan.weights)}, gradients {size(plan.gradients)}, "
                    f"optimizer {size(plan.optimizer)}, activations about {size(plan.activations)}",
                ),
                ("cache", f"{size(plan.cache)} for one sequence of {config.data.sequence_length} tokens"),
                (
                    "work",
                    f"{number(plan.flops_per_step)} FLOPs a step, {plan.length}{tokens}",
                ),
                (
                    "this machine",
                    f"{number(plan.matmul_rate)} FLOPs a second in large matrix products, measured now",
                ),
                ("time", plan.time),
            ]
        )
    )
    console.print("\nnothing was read, allocated or written: this was a dry run", style="dim")


def show_next(result: TrainResult, config: Config) -> None:
    """The commands that one would type now."""
    run = shlex.quote(str(result.run))
    held_out = "" if result.validation is None else f", held-out loss {result.validation.loss:.4f}"
    if result.validation is not None and result.validation.bits_per_byte is not None:
        held_out += f" ({result.validation.bits_per_byte:.3f} bits per byte)"
    console = stdout()
    console.print(
        f"\nstep {result.step:,}, {number(result.tokens)} tokens in {seconds(result.elapsed)}{held_out}"
    )
    lines = []
    if config.training.objective == "chat":
        lines.append((f"plait chat {run}", "talk with it"))
    elif config.model.head.kind == "lm" and config.model.causal:
        prompt = next((text for text in config.training.sample_prompts if text), "Once upon a time")
        lines.append((f"plait generate {run} {shlex.quote(prompt)}", "what it writes"))
    more = {
        "steps": f" --training.steps={2 * result.step}",
        "time": f" --training.minutes={2 * (config.training.minutes or 0):g}",
        "signal": "",
    }
    lines.append((f"plait train --resume {run}{more[result.stopped]}", "go on"))
    lines.append((f"plait plot {run}", "the loss curve"))
    console.print("next:")
    width = max(len(command) for command, _ in lines)
    for command, what in lines:
        console.print(f"  {command:<{width}}   # {what}")
