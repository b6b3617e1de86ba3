"""A corpus that every machine with Python has: the source of Python's own standard library, without its
tests.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path, PurePath

from plait.config.errors import DataError

# Chosen so that the held-out files are 3 to 5 % of the bytes in Python 3.11 to 3.13.
HELD_OUT_FRACTION = 0.045
# Tests; what users install; and the text of Python's manual, generated into one file of strings.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)


def stdlib_files() -> list[tuple[str, Path]]:
    """(relative path, path) of each .py file of the standard library, sorted by relative path.

    Only what `sys.stdlib_module_names` names: files made when this Python was built, or put beside it by a
    distribution, differ between machines. DataError if there is no source (a zipped or stripped Python).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        below = PurePath(folder).relative_to(root)
        if folder == str(root):
            folders[:] = sys.stdlib_module_names.intersection(folders)
            names = [name for name in names if name.removesuffix(".py") in sys.stdlib_module_names]
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        files += [((below / name).as_posix(), Path(folder, name)) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"the standard library has no source in {root}; name another corpus in data.train")
    return sorted(files)
