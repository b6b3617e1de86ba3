"""metrics.jsonl: a line for a logged step or an evaluation; appended to, cut back when a run resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plait.config.errors import TrainingError
from plait.tokenizers.files import write_file

METRICS = "metrics.jsonl"


class Metrics:
    """The file of a run; every line holds ``step`` and ``kind`` ("train", "evaluation" or "core")."""

    def __init__(self, run: Path, step: int = 0) -> None:
        """Keep the lines up to ``step`` and forget later ones, and one that was half written."""
        self.path = run / METRICS
        kept = [record for record in read_metrics(run) if record["step"] <= step] if step else []
        with writing(self.path):
            write_file(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; TrainingError if the disk does not take it."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, [] if there is none; a line that is not whole is left out."""
    path = run / METRICS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that refuses is one line for the user."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
