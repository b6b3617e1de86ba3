"""What BitByte's commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from plait.config.lazy import load_object
from plait.formats.bitbyte import read
from plait.formats.native import save_model


def run_script(action: Callable[[], int]) -> int:
    """The exit status of a command; what went wrong is told in one line, as ``plait`` does."""
    status: int = load_object("plait.cli.entry:guarded")(action)
    return status


def plait(*words: str) -> int:
    """Run a command of ``plait``; its exit status."""
    status: int = load_object("plait.cli.entry:main")(list(words))
    return status


@contextmanager
def plait_folder(path: str | Path) -> Iterator[Path]:
    """A model as a folder that ``plait`` loads: Plait's own, or a checkpoint of BitByte's, converted for a while."""
    path = Path(path)
    if path.is_dir() and not any(path.glob("*.pt")):
        yield path
        return
    model, tokenizer = read(path)
    with TemporaryDirectory(prefix="plait-") as folder:
        save_model(model, folder, tokenizer)
        yield Path(folder)
