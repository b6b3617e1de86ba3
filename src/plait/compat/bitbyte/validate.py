"""Bits per byte of a model over files of bytes or text: ``plait eval bpb``.

python -m plait.compat.bitbyte.validate --ckpt runs/bytes --data bytes/validation
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from plait.compat.bitbyte.commands import plait, plait_folder, run_script


def main(words: Sequence[str]) -> int:
    """Print them; the exit status."""
    parser = argparse.ArgumentParser(prog="validate", description="Bits per byte of a model.")
    parser.add_argument(
        "--ckpt", required=True, help="a run, a saved model, or a checkpoint of BitByte's form"
    )
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or globs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    given = parser.parse_args(words)
    with plait_folder(given.ckpt) as folder:
        return plait("eval", "bpb", str(folder), *given.data, f"--device={given.device}")


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
