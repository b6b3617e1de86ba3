"""Commands that take the values of a config as options: ``plait train x.yaml --training.lr=1e-3 --model.d-model 64``.

Every path of the config is an option, and far too many to declare; so they are taken out of the command line before
typer reads the rest, and ``load_config`` judges them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

_META = "plait.overrides"
_BARE = re.compile(r"[A-Za-z][\w-]*(\.[\w-]+)+=")
EPILOG = "Any value of the config may follow as --section.key=value, with - and _ alike: --training.lr=1e-3"


class ConfigCommand(TyperCommand):
    """A command with overrides; the function finds them by ``overrides(ctx)``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command, of what is left when the overrides are taken out."""
        names = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        rest, ctx.meta[_META] = split_overrides(args, names | {"--help"})
        return super().parse_args(ctx, rest)


def overrides(ctx: typer.Context) -> list[str]:
    """The overrides on the command line of a ``ConfigCommand``, as ``--path=value`` or ``--path``."""
    found: list[str] = ctx.meta[_META]
    return found


def split_overrides(words: Sequence[str], own: Collection[str]) -> tuple[list[str], list[str]]:
    """(what belongs to the command, overrides) of a command line; ``own``: the command's options, as ``--name``.

    An override is ``--a.b=value``, ``--a.b value``, ``a.b=value``, or an option that neither is nor resembles one
    of the command's: the config may know it, or else knows what to suggest.
    """
    rest: list[str] = []
    found: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            rest += words[at - 1 :]
            break
        name, equals, _ = word.partition("=")
        if _BARE.match(word) and not Path(word).exists():
            found.append(f"--{word}")
        elif not name.startswith("--") or _belongs(name, own):
            rest.append(word)
        elif equals or at == len(words) or words[at].startswith("--"):
            found.append(word)
        else:
            found.append(f"{word}={words[at]}")
            at += 1
    return rest, found


def _belongs(name: str, own: Collection[str]) -> bool:
    if name in own:
        return True
    return "." not in name and bool(get_close_matches(name, own, 1, 0.75))
