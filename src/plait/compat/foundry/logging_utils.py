"""Log files as Foundry's LoggingConfig describes them, by the standard library's logging."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from plait.config.errors import TrainingError
from plait.config.originals.foundry_schema import LoggingConfig

_MEGABYTE = 1 << 20
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JSONLines(logging.Formatter):
    """Each record as one line of JSON: time, level, name, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "name": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info is not None:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)


def setup_logging(
    name: str,
    experiment: str = "default",
    log_dir: str | Path = "logs",
    level: int = logging.INFO,
    config: LoggingConfig | None = None,
) -> logging.Logger:
    """The logger ``name``, writing to stderr from ``level`` on and into ``log_dir/experiment/name.log``.

    ``config`` tells the file's level, rotation and form. Called again, it begins anew. TrainingError if the file
    cannot be written.
    """
    settings = LoggingConfig() if config is None else config
    logger = logging.getLogger(name)
    close_logging(logger)
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level)
    console.setFormatter(logging.Formatter(_FORMAT))
    path = Path(log_dir) / experiment / f"{name}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = RotatingFileHandler(
            path,
            maxBytes=settings.max_log_size_mb * _MEGABYTE,
            backupCount=settings.max_log_files - 1,
            encoding="utf-8",
        )
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
    file.setLevel(settings.file_level)
    file.setFormatter(JSONLines() if settings.use_structured_logging else logging.Formatter(_FORMAT))
    for handler in (console, file):
        logger.addHandler(handler)
    logger.setLevel(min(level, file.level))
    logger.propagate = False
    return logger


def close_logging(logger: logging.Logger) -> None:
    """Close the files of a logger and take its handlers away."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def console_level(config: LoggingConfig) -> int:
    """The level of the console: ``console_level``, or its older name ``level`` if that alone was given."""
    old = "level" in config.model_fields_set and "console_level" not in config.model_fields_set
    return logging.getLevelNamesMapping()[config.level if old else config.console_level]
