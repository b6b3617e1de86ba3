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
    "plot": Entry("plait.cli.plot:app", "Draw a run's loss curve"),
    "info": Entry("plait.cli.info:app", "Show a model's stack: parameters, FLOPs, memory of each layer"),
    "doctor": Entry("plait.cli.doctor:app", "Show what this machine offers and check that it computes right"),
    "tokenizer": Entry("plait.cli.tokenizer:app", "Train a tokenizer: plait tokenizer train"),
    "data": Entry("plait.cli.data:app", "Turn text into token shards: plait data prepare"),
    "config": Entry("plait.cli.config:app", "Look at configs: plait config show | validate | list"),
}
