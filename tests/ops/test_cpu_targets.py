"""CPU kernels for processors without AVX-512: compiled for one in a process of its own, and checked there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SSE = "+sse,+sse2,+cx16,+64bit,+cmov,+fxsr,+mmx"
AVX2 = f"{SSE},+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe,+xsave"
# an odd size of each width: parts of vectors and of tiles are left
SHAPES = {
    "selective_scan": "B2,L70,D21,N5",
    "ssd": "B2,L70,H4,P20,N33",
    "trapezoidal_ssd": "B2,L70,H4,P20,N33",
    "causal_conv1d": "B2,L70,C21",
    "gated_norm": "B2,L70,C37",
}
PROGRAM = """
import sys, torch
from plait.bench.ops import Shape, benchmark_ops
from plait.ops import numba_support
assert not numba_support.AVX512
torch.set_num_threads(1)
for pair in sys.argv[1:]:
    name, _, text = pair.partition("=")
    sizes = {part[0]: int(part[1:]) for part in text.split(",")}
    shape = Shape(sizes.pop("B"), sizes.pop("L"), sizes)
    (row,) = benchmark_ops(
        [name], torch.device("cpu"), torch.float32, shapes=[shape], backends=["cpu"], seconds=0.001
    ).rows
    print(name, row["backend"], row.get("failed", "right"))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for x86")
@pytest.mark.parametrize(
    ("name", "features", "ops"),
    # ssd's kernels take longest, and are made of the same tiles as the scan's
    [("haswell", AVX2, list(SHAPES)), ("x86-64", SSE, ["selective_scan", "causal_conv1d", "gated_norm"])],
    ids=["haswell", "x86-64"],
)
def test_kernels_are_right_on_processors_without_avx512(
    name: str, features: str, ops: list[str], tmp_path: Path
) -> None:
    """Outputs and gradients against the float64 reference, as before each benchmark."""
    target = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(f"{op}={SHAPES[op]}" for op in ops)],
        env={**os.environ, **target},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{op} cpu right" for op in ops]
