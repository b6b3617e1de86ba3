"""A small ternary Mamba, trained on the source of Python's standard library, and what it writes then.

python -m plait.compat.bitbyte.demo_mamba --steps 200 --out runs/demo_mamba
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from plait.compat.bitbyte import train
from plait.compat.bitbyte.commands import plait, run_script

PROMPT = "def "


def main(words: Sequence[str]) -> int:
    """Train and write; the exit status. Words that are not known here go on to ``train``."""
    parser = argparse.ArgumentParser(
        prog="demo_mamba", description="A small ternary Mamba.", allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=200, help="updates of the weights")
    parser.add_argument("--out", default="runs/demo_mamba", help="the run's folder")
    given, more = parser.parse_known_args(words)
    small = {"n_layer": 4, "d_model": 128, "d_ff": 344, "seq_len": 256, "batch_size": 8, "grad_accum": 1}
    flags = {"model_family": "mamba", "lr": 2e-3, **small, "steps": given.steps, "out": given.out}
    text = ["--data=stdlib:", "--data.format=auto", "--data.validation_fraction=0.02"]
    status = train.main([*(f"--{name}={value}" for name, value in flags.items()), *text, *more])
    return status or plait("generate", given.out, PROMPT, "--max-new-tokens=200")


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
