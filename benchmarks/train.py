"""Training steps of whole models: tokens a second, memory, peers; see `--help`.

python benchmarks/train.py --device cpu|cuda --json FILE [...]: the same as `plait bench train`.
"""

import sys

from plait.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "train", *sys.argv[1:]]))
