"""Continue a text with a model of bytes: ``plait generate``.

python -m plait.compat.bitbyte.demo_generate --ckpt runs/bytes --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from plait.compat.bitbyte.commands import plait, plait_folder, run_script


def main(words: Sequence[str]) -> int:
    """Print the continuation; the exit status."""
    parser = argparse.ArgumentParser(prog="demo_generate", description="Continue a text.")
    parser.add_argument(
        "--ckpt", required=True, help="a run, a saved model, or a checkpoint of BitByte's form"
    )
    parser.add_argument("--prompt", required=True, help="the text")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="bytes to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest byte")
    parser.add_argument("--top_k", type=int, help="only among the k likeliest bytes")
    parser.add_argument("--seed", type=int, help="the same seed writes the same text")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    given = parser.parse_args(words)
    options = {
        name.replace("_", "-"): value
        for name, value in vars(given).items()
        if name not in ("ckpt", "prompt") and value is not None
    }
    with plait_folder(given.ckpt) as folder:
        more = [f"--{name}={value}" for name, value in options.items()]
        return plait("generate", str(folder), given.prompt, *more)


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
