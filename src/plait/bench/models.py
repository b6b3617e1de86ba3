"""Whole models as benchmarks: which there are, and the check that each passes before it is timed.

A name is family-size, "mamba2-370m": the sizes of the published tables, 70m with a vocabulary of 32,000 for CPUs. A
Transformer has half as many layers as a Mamba, as each has an MLP too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plait.config.errors import DataError, PlaitError, nearest
from plait.config.schema import ModelConfig
from plait.models.model import Model
from plait.ops.dispatch import use_backend


class Size(NamedTuple):
    """Width, layers of a Mamba, rows of the embedding."""

    d_model: int
    n_layer: int
    vocabulary: int


SIZES = {
    "70m": Size(768, 12, 32000),
    "130m": Size(768, 24, 50280),
    "370m": Size(1024, 48, 50280),
    "1.3b": Size(2048, 48, 50280),
}
PEERS = ("transformers", "mamba_ssm")
FAMILIES = ("mamba", "mamba2", "transformer")
CHECKED_LAYERS, CHECKED_TOKENS, CHECKED_VOCABULARY = 2, 100, 128
TOLERANCE = 1e-3
"""Of logits and of each parameter's gradient, relative RMS, float32 against the reference in float64."""
TOLERANCE_NARROW = 5e-2
"""Of logits alone, where products are in 16 bits: their own rounding decides; gradients were checked in float32."""
LOSS_NEAR = 1.0
"""Nats: how far from ln(vocabulary) the loss of a new model on random tokens may be."""


def split_name(name: str) -> tuple[str, Size]:
    """Family and size of "mamba2-370m"; DataError for other names."""
    family, _, size = name.partition("-")
    if family not in FAMILIES or size not in SIZES:
        every = [f"{f}-{s}" for f in FAMILIES for s in SIZES]
        raise DataError(
            f"there is no model {name!r} to measure{nearest(name, every)}; there are {', '.join(every)}"
        )
    return family, SIZES[size]


def model_config(name: str, *, layers: int | None = None, vocabulary: int | None = None) -> ModelConfig:
    """The model of a name, or a shorter one with fewer words."""
    family, size = split_name(name)
    values: dict[str, Any] = {
        "d_model": size.d_model,
        "vocab_size": vocabulary or size.vocabulary,
        "norm": {"kind": "rms"},
        "mlp": "none",
    }
    if family == "transformer":
        values |= {"pattern": "T", "mlp": "swiglu", "n_layer": layers or size.n_layer // 2}
    else:
        values |= {"pattern": "M" if family == "mamba" else "M2", "n_layer": layers or size.n_layer}
    return ModelConfig.model_validate(values)


def check(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of two layers of the model's width, logits and gradients, against the reference in float64.

    In float32, and with products in ``dtype`` if that is narrower. PlaitError if it is too large.
    """
    torch.manual_seed(0)
    config = model_config(name, layers=CHECKED_LAYERS, vocabulary=CHECKED_VOCABULARY)
    model = Model(config, device=device)
    ids = torch.randint(CHECKED_VOCABULARY, (2, CHECKED_TOKENS), device=device)
    with exact_products():
        with use_backend("reference"):
            true = _numbers(deepcopy(model).double(), ids)
        errors = [relative_error(a, b) for a, b in zip(_numbers(model, ids), true, strict=True)]
        require(name, max(errors), TOLERANCE)
        if dtype in (torch.bfloat16, torch.float16):
            with torch.no_grad(), torch.autocast(device.type, dtype):
                logits = model(ids).logits
            require(
                f"{name} in {str(dtype).removeprefix('torch.')}",
                relative_error(logits, true[0]),
                TOLERANCE_NARROW,
            )
    return max(errors)


def check_loss(name: str, loss: float) -> None:
    """PlaitError unless a new model's loss is about that of guessing."""
    chance = math.log(split_name(name)[1].vocabulary)
    if not abs(loss - chance) < LOSS_NEAR:
        raise PlaitError(f"{name}: the first loss is {loss:.3f}, that of guessing is {chance:.3f}; not timed")


def require(what: str, error: float, most: float) -> None:
    """PlaitError if an error is above what is let pass, or is no number."""
    if not error <= most:
        raise PlaitError(
            f"{what}: relative error {error:.2g} against the reference exceeds {most:g}; not timed"
        )


def relative_error(a: Tensor, b: Tensor) -> float:
    """rms(a - b) / rms(b), infinite if it is no number."""
    error = float((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt())
    return math.inf if math.isnan(error) else error


@contextmanager
def exact_products() -> Iterator[None]:
    """No TensorFloat-32: float32 means float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def failure(fault: Exception) -> str:
    """What went wrong with one row, in one line: the others are measured all the same."""
    text = " ".join(str(fault).split())[:300]
    return text if isinstance(fault, PlaitError) else f"{type(fault).__name__}: {text}"


def kernels(call: Callable[[], object]) -> str:
    """The kernels that a call runs, "selective_scan_gpu causal_conv1d_gpu ..."; "torch" if all is plain torch."""
    with _Seen() as seen, _noted(seen.names):
        call()
    return " ".join(sorted(seen.names)) or "torch"


def ran_by(names: str) -> dict[str, str]:
    """What a row says of kernels as ``kernels`` names them, or of another package: the backends, and their names."""
    if names.split()[0] in PEERS:
        return {"backend": names}
    found = {
        "torch" if n.startswith(("aten:", "torch")) else "gpu" if "_gpu" in n else "cpu"
        for n in names.split()
    }
    return {"backend": " ".join(sorted(found)), "kernels": names}


class _Seen(TorchDispatchMode):
    """Notes the custom ops of Plait, and torch's kernels of attention; backward counts with forward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        package, _, op = func.name().partition("::")
        op = op.partition(".")[0]
        if package == "plait":
            self.names.add(op.removesuffix("_backward"))
        elif package == "aten" and ("attention" in op and "backward" not in op):
            self.names.add("aten:" + op.strip("_"))
        return func(*args, **(kwargs or {}))


@contextmanager
def _noted(names: set[str]) -> Iterator[None]:
    """Notes the kernels of decoding on a CPU, which are no custom ops, where there are any."""
    if find_spec("numba") is None:
        yield
        return
    team: Any = import_module("plait.ops.numba_team")

    def note(kernel: Any, entry: tuple[int, ...], keep: Sequence[Tensor | None]) -> None:
        names.add(kernel.name)
        team.Program([entry])()

    with team.recording(note):
        yield


def _numbers(model: Model, ids: Tensor) -> list[Tensor]:
    """Logits, and the gradient of the loss by every parameter."""
    out = model(ids, labels=ids, logits=True)
    return [out.logits.detach(), *torch.autograd.grad(out.loss_sum, list(model.parameters()))]
