"""Talk with a trained model: ``plait chat`` with nanochat's options.

python -m plait.compat.nanochat.scripts.chat_cli -i sft -p "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from plait.compat.nanochat.checkpoint_manager import SOURCES, plait_folder
from plait.compat.nanochat.common import run_script
from plait.config.lazy import load_object


def main(words: Sequence[str]) -> int:
    """Answer one prompt, or hold a conversation; the exit status."""
    parser = argparse.ArgumentParser(prog="chat_cli", description="Talk with a trained model.")
    parser.add_argument("-i", "--source", choices=SOURCES, default="sft", help="its stage")
    parser.add_argument("-g", "--model-tag", help="which model; the largest by default")
    parser.add_argument("-s", "--step", type=int, help="its step; the last by default")
    parser.add_argument("-p", "--prompt", default="", help="one question: its answer alone is shown")
    parser.add_argument("-t", "--temperature", type=float, default=0.6)
    parser.add_argument("-k", "--top-k", type=int, default=50)
    parser.add_argument("--device-type", default="", help="cuda, cpu or mps; the best there is by default")
    parser.add_argument("--allow-pickle", action="store_true", help="a tokenizer.pkl may be opened")
    given = parser.parse_args(words)
    with plait_folder(given.source, given.model_tag, given.step, allow_pickle=given.allow_pickle) as folder:
        options = [f"--temperature={given.temperature}", f"--top-k={given.top_k}"]
        options += [
            f"--device={given.device_type or 'auto'}",
            *([f"--prompt={given.prompt}"] if given.prompt else []),
        ]
        status: int = load_object("plait.cli.entry:main")(["chat", str(folder), *options])
    return status


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
