"""Floor 10: the command line. One small file a command, loaded when it is called."""

from plait.cli.entry import main

__all__ = ["main"]
