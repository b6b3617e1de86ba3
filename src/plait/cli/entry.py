"""Where ``plait`` begins: finds the command, runs it, and turns what went wrong into one line.

Nothing here imports torch, so ``plait --help`` and ``plait COMMAND --help`` answer at once. Exit status: 0; 1 for an
error; 2 for a command line that makes no sense; 130 after Ctrl-C.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any

from plait.cli.table import COMMANDS
from plait.config.errors import PlaitError, nearest
from plait.config.lazy import load_object

_PARAGRAPH_LINE = re.compile(r"(?<=\S)\n(?=\S)")  # a docstring's line ends, which are not the terminal's

_HELP = """\
Plait: language models whose layers are any mix of Mamba, attention and recurrent layers

Usage: plait COMMAND [OPTIONS]

Commands:
{commands}

Options:
  --help     This, or after a command what it takes
  --version  The version

First steps:
  plait demo                                      a model trained on this machine, in minutes
  plait train tiny --data.train=path/to/text      the same on text of your own
  plait generate runs/tiny "Once upon a time"     what it writes
  plait info hybrid                               a model's stack; try any name of `plait config list`"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own) and return its exit status."""
    # Large pages for CPU tensors: torch reads this when it is first imported. In virtual machines, where a page walk
    # is long, it makes training measurably faster; elsewhere it costs nothing.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows another
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    return guarded(lambda: _run(words))


def guarded(action: Callable[[], int]) -> int:
    """What ``action`` returns; the exit status of whatever went wrong otherwise, which is told in one line."""
    try:
        status = action()
        sys.stdout.flush()  # a reader that has gone shows here, not while Python exits
        return status
    except PlaitError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`plait info x | head`); Python would complain again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except RuntimeError as error:
        if _out_of_memory(error):
            return _fail(
                "out of memory: take a smaller model, batch or length; in training, --training.micro_batch_tokens (the "
                "step stays the same, in smaller parts) or --training.activation_checkpointing=true"
            )
        raise


def help_text() -> str:
    """What ``plait --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {entry.line}" for name, entry in COMMANDS.items())
    return _HELP.format(commands="\n".join(lines))


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(help_text())
        return 0
    if words[0] in ("--version", "-V"):
        print(f"plait {_version()}")
        return 0
    name, *words = words
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; commands: {', '.join(COMMANDS)}"
        return _fail(f"there is no command {name!r}{hint}", 2)
    app = load_object(COMMANDS[name].target)
    import typer

    command: Any = typer.main.get_command(app)
    for each in (command, *getattr(command, "commands", {}).values()):
        each.help = _PARAGRAPH_LINE.sub(" ", each.help or "")
    if not words and isinstance(command, typer.core.TyperGroup):
        words = ["--help"]  # a group by itself does nothing
    try:
        status = command.main(words, prog_name=f"plait {name}", standalone_mode=False)
    except typer.TyperException as error:  # a command line that the command does not understand
        return _fail(_usage(error, name), error.exit_code)
    except typer.Abort:
        return 130
    return status if isinstance(status, int) else 0


def _usage(error: Any, name: str) -> str:
    """What a command did not understand, in one line."""
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; see plait {name} --help"


def _fail(text: str, status: int = 1) -> int:
    rank = os.environ.get("RANK")
    who = f"[rank {rank}] " if rank not in (None, "0") else ""
    sys.stdout.flush()
    print(f"{who}error: {' '.join(text.split())}", file=sys.stderr)
    return status


def _out_of_memory(error: RuntimeError) -> bool:
    torch: ModuleType | None = sys.modules.get("torch")
    return torch is not None and (
        isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
    )


def _version() -> str:
    return version("plait")
