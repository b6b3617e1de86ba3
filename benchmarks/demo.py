"""Run `plait demo` as it is and keep what it reached, with the hardware and versions: the numbers in the README.

python benchmarks/demo.py [--json FILE] [demo options, e.g. --minutes 1]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "demo.json", help="where the result goes")
    options, demo = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "demo")
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "plait", "demo", "--out", str(run), *demo], check=True)
        wall = time.monotonic() - begin
        reached = json.loads((run / "demo.json").read_text())
        (start,) = json.loads((run / "env.json").read_text())["starts"]
    kept = ("time", "python", "platform", "packages", "cpu", "cores", "threads", "git")
    result = {
        **reached,
        "tokens_per_second": round(reached["tokens"] / reached["seconds"]),
        "wall_seconds": round(wall, 1),
        "options": demo,
        **{key: start[key] for key in kept},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
