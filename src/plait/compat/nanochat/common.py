"""Where nanochat keeps its files, and what its scripts share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from plait.config.lazy import load_object


def get_base_dir() -> Path:
    """$NANOCHAT_BASE_DIR, else .cache/nanochat in the user's home: data, tokenizer, checkpoints."""
    given = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "nanochat"


def print0(*words: object) -> None:
    """Print, on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(*words, flush=True)


def run_script(action: Callable[[], int]) -> int:
    """The exit status of a script; what went wrong is told in one line, as ``plait`` does."""
    status: int = load_object("plait.cli.entry:guarded")(action)
    return status
