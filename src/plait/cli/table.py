"""The table of commands: what each is called, where it lives, and its line in ``plait --help``.

A module named here is imported when its command is called, never before; ``app`` in it is the command.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One command: ``"module:app"`` and what it does, in one line."""

    target: str
    line: str


COMMANDS: dict[str, Entry] = {
    "demo": Entry(
        "plait.cli.demo:app", "Train a small hybrid on this machine's own Python source, from nothing"
    ),
    "train": Entry("plait.cli.train:app", "Train a model that a config describes, or resume a run"),
    "generate": Entry("plait.cli.generate:app", "Continue a text with a trained model"),
    "convert": Entry(
        "plait.cli.convert:app", "Turn a model of nanochat, MiniMamba, Foundry or BitByte into one of Plait's"
    ),
    "chat": Entry("plait.cli.chat:app", "Talk with a model that was trained on conversations"),
    "eval": Entry("plait.cli.eval:app", "Evaluate: plait eval bpb | core | surprisal | minimal-pairs"),
    "plot": Entry("plait.cli.plot:app", "Draw a run's loss curve"),
    "info": Entry("plait.cli.info:app", "Show a model's stack: parameters, FLOPs, memory of each layer"),
    "estimate": Entry("plait.cli.estimate:app", "Tell what of a config fits into a given memory"),
    "doctor": Entry("plait.cli.doctor:app", "Show what this machine offers and check that it computes right"),
    "bench": Entry("plait.cli.bench:app", "Time this machine: plait bench ops | train | decode"),
    "tokenizer": Entry(
        "plait.cli.tokenizer:app", "Train or import a tokenizer: plait tokenizer train | import"
    ),
    "data": Entry(
        "plait.cli.data:app", "Turn text into token shards or raw bytes: plait data prepare | pack"
    ),
    "config": Entry(
        "plait.cli.config:app", "Look at configs: plait config show | validate | schedule | list"
    ),
}
