"""Ops against their floors, their other backends and their peers; see `--help`.

python benchmarks/ops.py --device cpu|cuda --json FILE [...]: the same as `plait bench ops`.
"""

import sys

from plait.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", *sys.argv[1:]]))
