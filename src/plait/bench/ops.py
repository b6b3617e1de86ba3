"""Ops against their floors, their other backends and, where installed, their peers.

Every row passed a check first: the backend's outputs and gradients on a shorter sequence of the same widths against
the float64 reference. Backends and peers of one shape are timed in turns, in one run. What fails is a row that says
why, with no time; ``wrong`` in it tells a backend that computes wrong from one that cannot run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.bench.ceilings import Ceilings, ceilings
from plait.bench.models import failure
from plait.bench.peers import scan_loop, ssd_chunked, state_spaces
from plait.bench.timing import Result, measure_together
from plait.config.errors import BackendError, PlaitError
from plait.ops.causal_conv1d import CAUSAL_CONV1D, causal_conv1d
from plait.ops.dispatch import Op, choose_name
from plait.ops.gated_norm import GATED_NORM, gated_norm
from plait.ops.selective_scan import SELECTIVE_SCAN, selective_scan
from plait.ops.ssd import SSD, TRAPEZOIDAL_SSD, ssd, trapezoidal_ssd

CHECKED = 200  # tokens of the sequences that are checked
# Relative RMS errors that are let pass, of outputs and gradients: the tests are stricter.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """B sequences of L tokens, and the op's widths."""

    batch: int
    length: int
    widths: dict[str, int]

    def __str__(self) -> str:
        widths = " ".join(f"{name}{size}" for name, size in self.widths.items())
        return f"B{self.batch} L{self.length} {widths}"


@dataclass(frozen=True)
class Bench:
    """An op as a benchmark: its inputs at a shape, how to call it, and the least work it is."""

    op: Op
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    call: Callable[..., Outputs]
    work: Callable[[Shape, int, bool], tuple[float, float, float]]  # (bytes, flops, exponentials)
    shapes: dict[str, list[Shape]]  # by type of device
    peers: dict[str, Callable[[torch.device], Callable[..., Outputs] | None]]


def benchmark_ops(
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    shapes: Sequence[Shape] | None = None,
    backends: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    seconds: float = 1.0,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Result:
    """Time the named ops forward and forward + backward; ``say`` is given each row as it comes.

    shapes: instead of those of the published tables. backends: by default the one that runs by itself, and
    ``portable``. threads: on a CPU, each of these numbers of threads in turn; by default as many as torch has now.
    """
    result = Result("ops", str(device))
    before = torch.get_num_threads()
    try:
        limits = {}
        for count in threads or [before]:
            torch.set_num_threads(count)
            limits[count] = ceilings(device, dtype)
        for name in names:
            bench = BENCHES[name]
            for shape in shapes or bench.shapes[device.type]:
                for row in _rows(name, bench, shape, device, dtype, backends, limits, seconds):
                    result.rows.append(row)
                    say(row)
    finally:
        torch.set_num_threads(before)
    return result


def _rows(
    name: str,
    bench: Bench,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    backends: Sequence[str] | None,
    limits: dict[int, Ceilings],  # by threads
    seconds: float,
) -> Iterator[dict[str, Any]]:
    own = choose_name(bench.op, None, device.type, dtype)
    calls = {backend: _with(bench.call, backend) for backend in backends or dict.fromkeys((own, "portable"))}
    for peer, find in bench.peers.items():
        found = None if backends else find(device)
        if found is not None:
            calls[peer] = found
    ready: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for label, call in calls.items():
        try:
            error = _check(bench, call, shape, device, dtype)
            forward, both = _timed(bench, call, shape, device, dtype)
            both()
            if not error <= TOLERANCES[dtype]:
                raise PlaitError(f"relative error {error:.2g} exceeds {TOLERANCES[dtype]:g}; not timed")
        except (
            Exception
        ) as fault:  # whatever one backend does wrong here is reported; the others are measured
            refused = isinstance(fault, (BackendError, torch.OutOfMemoryError)) or label in bench.peers
            yield {
                "op": name,
                "shape": str(shape),
                "dtype": _short(dtype),
                "backend": label,
                "failed": failure(fault),
                "wrong": not refused,
            }
            continue
        ready[label] = (forward, both)
    for count, limit in limits.items():
        torch.set_num_threads(count)
        forwards = measure_together([f for f, _ in ready.values()], device, seconds=seconds)
        boths = measure_together([b for _, b in ready.values()], device, seconds=seconds)
        for label, one, two in zip(ready, forwards, boths, strict=True):
            floor, bound = limit.floor(*bench.work(shape, dtype.itemsize, False))
            floor2, bound2 = limit.floor(*bench.work(shape, dtype.itemsize, True))
            yield {
                "op": name,
                "shape": str(shape),
                "dtype": _short(dtype),
                "backend": label,
                "threads": count if device.type == "cpu" else None,
                "forward_ms": one.median,
                "forward_floor": f"{floor:.3f} {bound}",
                "both_ms": two.median,
                "both_floor": f"{floor2:.3f} {bound2}",
                # how many times as long as the first of these rows, and a backward in forwards
                "forward_times": one.median / forwards[0].median,
                "both_times": two.median / boths[0].median,
                "backward_forwards": (two.median - one.median) / one.median,
                "repeats": two.n,
            }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with(call: Callable[..., Outputs], backend: str) -> Callable[..., Outputs]:
    return lambda **inputs: call(**inputs, backend=backend)


def _leaves(inputs: Inputs) -> Inputs:
    return {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}


def _check(
    bench: Bench, call: Callable[..., Outputs], shape: Shape, device: torch.device, dtype: torch.dtype
) -> float:
    """The largest relative RMS error of outputs and gradients on a short sequence, one of the batch."""
    short = Shape(1, min(shape.length, CHECKED), shape.widths)
    inputs = bench.inputs(short, dtype, device)

    def run(call: Callable[..., Outputs], kind: torch.dtype | None) -> list[Tensor]:
        leaves = _leaves({n: t if kind is None else t.to(kind) for n, t in inputs.items()})
        y = call(**leaves)[0]
        weight = torch.linspace(-1, 1, y.numel(), device=device, dtype=torch.float64).view(y.shape)
        grads = torch.autograd.grad((y.double() * weight.cos()).sum(), list(leaves.values()))
        return [y.detach(), *grads]

    got, want = run(call, None), run(_with(bench.call, "reference"), torch.float64)
    errors = [
        float((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt())
        for a, b in zip(got, want, strict=True)
    ]
    return math.inf if any(e != e for e in errors) else max(errors)


def _timed(
    bench: Bench, call: Callable[..., Outputs], shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without autograd, and forward with backward, on the shape itself."""
    leaves = _leaves(bench.inputs(shape, dtype, device))
    with torch.no_grad():
        grad = torch.randn_like(call(**leaves)[0])

    def forward() -> None:
        with torch.no_grad():
            call(**leaves)

    def both() -> None:
        torch.autograd.grad(call(**leaves)[0], list(leaves.values()), grad)

    return forward, both


def _draw(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(kind)

    return normal


def _scan_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    normal, (B, L), (D, N) = _draw(device, dtype), (shape.batch, shape.length), shape.widths.values()
    rates = torch.arange(1.0, N + 1, device=device).expand(D, N).clone()
    return {
        "x": normal(B, L, D), "dt": normal(B, L, D), "A": -rates, "B": normal(B, L, N), "C": normal(B, L, N),
        "D": torch.ones(D, device=device), "z": normal(B, L, D),
        "dt_bias": normal(D, kind=torch.float32) * 0.5 - 4.0,
    }  # fmt: skip


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any) -> Outputs:
    return selective_scan(x, dt, A, B, C, D, dt_softplus=True, **rest)


def _scan_work(shape: Shape, width: int, both: bool) -> tuple[float, float, float]:
    """Exponentials: one a state, softplus 2, silu 2; in backward the states' again, and the gates'."""
    D, N = shape.widths.values()
    places = shape.batch * shape.length * D
    n_bytes = places * width * (4 + (7 if both else 0)) + 2 * shape.batch * shape.length * N * width
    return n_bytes, places * N * (6 + (14 if both else 0)), places * ((2 * N + 9) if both else (N + 4))


def _ssd_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    normal, (B, L), (H, P, N) = _draw(device, dtype), (shape.batch, shape.length), shape.widths.values()
    return {
        "x": normal(B, L, H, P), "dt": normal(B, L, H), "A": -torch.linspace(1, 16, H, device=device),
        "B": normal(B, L, 1, N), "C": normal(B, L, 1, N), "D": torch.ones(H, device=device),
        "dt_bias": normal(H, kind=torch.float32) * 0.5 - 4.0,
    }  # fmt: skip


def _ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any) -> Outputs:
    return ssd(x, dt, A, B, C, D, dt_softplus=True, **rest)


def _ssd_work(shape: Shape, width: int, both: bool, chunk: int = 64) -> tuple[float, float, float]:
    """Of the chunked form with blocks of 64: scores, what is read of them, states written and read."""
    H, P, N = shape.widths.values()
    tokens = shape.batch * shape.length
    flops = tokens * (chunk * N + H * (chunk * P + 4 * P * N))
    n_bytes = width * tokens * (2 * H * P + 2 * N + H)
    return n_bytes * (2.5 if both else 1), flops * (3.5 if both else 1), 0.0


def _mamba3_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    normal, (B, L), (H, P, N) = _draw(device, dtype), (shape.batch, shape.length), shape.widths.values()
    dt = torch.rand(B, L, H, device=device, generator=torch.Generator(device).manual_seed(1)) * 0.1
    return {
        "v": normal(B, L, H, P), "k": normal(B, L, 1, H, N), "q": normal(B, L, 1, H, N),
        "log_decay": -dt * torch.linspace(1, 16, H, device=device), "dt": dt,
        "lam": torch.sigmoid(normal(B, L, H, kind=torch.float32)),
    }  # fmt: skip


def _mamba3(
    v: Tensor, k: Tensor, q: Tensor, log_decay: Tensor, dt: Tensor, lam: Tensor, **rest: Any
) -> Outputs:
    y, _ = trapezoidal_ssd(v, k, q, log_decay, dt, lam, **rest)
    return (y,)


def _mamba3_work(shape: Shape, width: int, both: bool) -> tuple[float, float, float]:
    H, P, N = shape.widths.values()
    n_bytes = width * shape.batch * shape.length * (2 * H * P + 2 * H * N + 3 * H)
    return n_bytes * (2.5 if both else 1), _ssd_work(shape, width, both)[1], 0.0


def _conv_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    normal, (C,) = _draw(device, dtype), shape.widths.values()
    x = normal(shape.batch, shape.length, C)
    return {"x": x, "weight": normal(C, 4, kind=torch.float32) * 0.5, "bias": normal(C, kind=torch.float32)}


def _conv(x: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> Outputs:
    return causal_conv1d(x, weight, bias, activation="silu", **rest)


def _norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    normal, (C,) = _draw(device, dtype), shape.widths.values()
    x, z = normal(shape.batch, shape.length, C), normal(shape.batch, shape.length, C)
    return {"x": x, "z": z, "weight": normal(C, kind=torch.float32)}


def _norm(x: Tensor, z: Tensor, weight: Tensor, **rest: Any) -> Outputs:
    return (gated_norm(x, z, weight, **rest),)


def _streams(
    reads_and_writes: int, backward: int
) -> Callable[[Shape, int, bool], tuple[float, float, float]]:
    """The work of an op that is bound by memory: so many passes over (B, L, C)."""

    def work(shape: Shape, width: int, both: bool) -> tuple[float, float, float]:
        (C,) = shape.widths.values()
        passes = reads_and_writes + (backward if both else 0)
        return width * shape.batch * shape.length * C * passes, 0.0, 0.0

    return work


def _shapes(widths: dict[str, int], *sizes: tuple[int, int]) -> list[Shape]:
    return [Shape(batch, length, widths) for batch, length in sizes]


_GPU_SIZES = ((16, 2048), (4, 8192), (1, 65536))

BENCHES: dict[str, Bench] = {
    "selective_scan": Bench(
        SELECTIVE_SCAN,
        _scan_inputs,
        _scan,
        _scan_work,
        {
            "cpu": _shapes({"D": 1536, "N": 16}, (1, 1024), (1, 4096)),
            "cuda": _shapes({"D": 4096, "N": 16}, *_GPU_SIZES),
        },
        {"loop": scan_loop, "mamba_ssm": state_spaces("selective_scan")},
    ),
    "ssd": Bench(
        SSD,
        _ssd_inputs,
        _ssd,
        _ssd_work,
        {
            "cpu": [
                *_shapes({"H": 24, "P": 64, "N": 128}, (1, 512), (1, 1024), (1, 2048)),
                *_shapes({"H": 24, "P": 64, "N": 64}, (1, 512), (1, 1024), (1, 2048)),
            ],
            "cuda": _shapes({"H": 64, "P": 64, "N": 128}, *_GPU_SIZES),
        },
        {"chunked 128": ssd_chunked, "mamba_ssm": state_spaces("ssd")},
    ),
    "trapezoidal_ssd": Bench(
        TRAPEZOIDAL_SSD,
        _mamba3_inputs,
        _mamba3,
        _mamba3_work,
        {
            "cpu": [
                *_shapes({"H": 24, "P": 64, "N": 64}, (1, 1024)),
                *_shapes({"H": 24, "P": 64, "N": 128}, (1, 1024)),
            ],
            "cuda": _shapes({"H": 64, "P": 64, "N": 128}, *_GPU_SIZES),
        },
        {},
    ),
    "causal_conv1d": Bench(
        CAUSAL_CONV1D,
        _conv_inputs,
        _conv,
        _streams(2, 3),
        {"cpu": _shapes({"C": 1536}, (1, 2048)), "cuda": _shapes({"C": 4096}, *_GPU_SIZES)},
        {},
    ),
    "gated_norm": Bench(
        GATED_NORM,
        _norm_inputs,
        _norm,
        _streams(3, 5),
        {"cpu": _shapes({"C": 1536}, (1, 2048)), "cuda": _shapes({"C": 4096}, *_GPU_SIZES)},
        {},
    ),
}
