"""The first training step of a whole model in a fresh process without any compiled kernel on disk.

python benchmarks/cold.py [mamba2-370m ...] [--size 16x2048] [--json FILE]

Each model runs in a process of its own with empty folders for the caches of Triton and torch. Counted are building the
model and one step (forward, backward, AdamW) under bfloat16 autocast; importing torch is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plait.bench.models import model_config, split_name
from plait.bench.timing import Result
from plait.cli.terminal import stdout, table

RESULTS = Path(__file__).parent / "results"
MODELS = ("mamba2-370m", "mamba-370m")


def first_steps(name: str, rows: int, length: int) -> dict[str, Any]:
    """Seconds of the first and the second step, in this process."""
    import torch

    from plait.models.model import Model

    device = torch.device("cuda")
    torch.zeros(1, device=device)  # the device itself is not what is measured
    begin = time.perf_counter()
    model = Model(model_config(name), device=device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(split_name(name)[1].vocabulary, (rows, length), device=device)
    taken = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss_sum / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return {"model": name, "shape": f"B{rows} L{length}", "first_s": taken[0], "second_s": taken[1]}


def main() -> None:
    """Measure each model in a process of its own, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--size", default="16x2048", help="sequences x tokens")
    parser.add_argument("--json", type=Path, default=RESULTS / "cold_gpu.json", help="where the result goes")
    parser.add_argument("--here", action="store_true", help="one model in this process, as JSON to stdout")
    options = parser.parse_args()
    rows, length = (int(n) for n in options.size.split("x"))
    if options.here:
        print(json.dumps(first_steps(options.models[0], rows, length)))
        return
    result = Result("cold", "cuda")
    shown = table("model", "shape", "first s", "second s")
    for name in options.models:
        with tempfile.TemporaryDirectory() as empty:
            caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
            command = [sys.executable, __file__, name, "--size", options.size, "--here"]
            ran = subprocess.run(
                command, env={**os.environ, **caches}, check=True, text=True, stdout=subprocess.PIPE
            )
        found = json.loads(ran.stdout.splitlines()[-1])
        result.rows.append(found)
        shown.add_row(found["model"], found["shape"], f"{found['first_s']:.1f}", f"{found['second_s']:.3f}")
    stdout().print(shown)
    result.write(options.json)


if __name__ == "__main__":
    main()
