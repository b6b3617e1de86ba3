"""One Mamba-2 layer at any length: time and memory a token of training, and of decoding after so long a context.

python benchmarks/length.py [--device cuda] [--longest 1048576] [--width 1024] [--json FILE]

Rows double from 2,048 tokens of one sequence. Training is forward and backward under bfloat16 autocast (float32 on a
CPU), decoding one token with the state that the whole context has left. Memory is what is held beyond the layer's
parameters: in training at most, in decoding the state. A row that fails says why; the longer ones are left out then.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from plait.bench.memory import in_use, peak_of
from plait.bench.models import failure
from plait.bench.timing import Result, measure
from plait.cli.terminal import stdout, table
from plait.mixers.layout import Layout
from plait.mixers.mamba2 import Mamba2

RESULTS = Path(__file__).parent / "results"
SHORTEST = 2048
PIECE = 65536
"""Tokens of a context that are read at once before decoding."""


def row(mixer: Mamba2, length: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds, nanoseconds and bytes a token of training at a length, and milliseconds a token of decoding."""
    narrow = device.type == "cuda"
    layout = Layout.dense(1, length, device=device)
    before = in_use(device)
    x = torch.randn(1, length, mixer.d_in, device=device, dtype=torch.bfloat16 if narrow else torch.float32)
    x.requires_grad_()
    dy = torch.randn_like(x)

    def both() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            y, _ = mixer(x, layout)
        torch.autograd.grad(y, [x, *mixer.parameters()], dy)

    both()
    peak = peak_of(both, device, before)
    timing = measure(both, device, seconds=seconds)
    return {
        "length": length,
        "both_ms": timing.median,
        "ns_per_token": 1e6 * timing.median / length,
        "peak_gib": None if peak is None else peak / 2**30,
        "bytes_per_token": None if peak is None else peak / length,
        "repeats": timing.n,
        **decoding(mixer, x.detach(), device, seconds),
    }


@torch.no_grad()
def decoding(mixer: Mamba2, x: torch.Tensor, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step after the tokens x, and the bytes of the state."""
    narrow, length = device.type == "cuda", x.shape[1]
    state = mixer.init_state(1, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        for begin in range(0, length, PIECE):
            piece = x[:, begin : begin + PIECE]
            start = torch.full((1,), begin, device=device)
            mixer.step(
                piece, Layout.dense(1, piece.shape[1], start=start, max_past=begin, device=device), state
            )
        start = torch.full((1,), length, device=device)
        one = Layout.dense(1, 1, start=start, max_past=length, device=device)
        token = x[:, :1].contiguous()
        timing = measure(lambda: mixer.step(token, one, state), device, seconds=seconds)
    return {"step_ms": timing.median, "state_bytes": state.nbytes}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--longest", type=int, default=1 << 20, help="tokens")
    parser.add_argument("--width", type=int, default=1024, help="d_model")
    parser.add_argument("--seconds", type=float, default=1.0, help="of repeats, a measurement")
    parser.add_argument("--json", type=Path, default=RESULTS / "length.json", help="where the result goes")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    mixer = Mamba2(Mamba2.options_class(), options.width).to(device)
    result = Result("length", str(device))
    shown = table("tokens", "both ms", "ns a token", "peak GiB", "bytes a token", "step ms", "state bytes")
    length = SHORTEST
    while length <= options.longest:
        try:
            found = row(mixer, length, device, options.seconds)
        except torch.OutOfMemoryError as fault:
            result.rows.append({"length": length, "failed": failure(fault)})
            break
        result.rows.append(found)
        numbers = ("both_ms", "ns_per_token", "peak_gib", "bytes_per_token", "step_ms", "state_bytes")
        shown.add_row(f"{length:,}", *("-" if found[n] is None else f"{found[n]:,.4g}" for n in numbers))
        length *= 2
    stdout().print(shown)
    result.write(options.json)


if __name__ == "__main__":
    main()
