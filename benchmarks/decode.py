"""Decoding of whole models: milliseconds a token, floors, peers; see `--help`.

python benchmarks/decode.py --device cpu|cuda --json FILE [...]: the same as `plait bench decode`.
"""

import sys

from plait.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "decode", *sys.argv[1:]]))
