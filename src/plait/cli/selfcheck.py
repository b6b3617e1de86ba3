"""Does each backend of each op compute on this machine what the reference does in float64? See ``cases.py``.

Compared are the outputs, the final states, and the gradients of a random weighting of both, for every input of an op
that has gradients; the error is the largest relative RMS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.cli.cases import CASES, Case

TOLERANCE = 1e-5  # of float32


def check(op: str, backend: str, device: torch.device, seed: int = 0) -> float:
    """The relative RMS error of a backend in float32 against the reference in float64; infinite if not a number."""
    case = CASES[op](torch.Generator().manual_seed(seed))
    truth = _results(case, "reference", torch.device("cpu"), wide=True, seed=seed)
    found = _results(case, backend, device, wide=False, seed=seed)
    return max(relative_rms(found[name], truth[name]) for name in truth)


def relative_rms(found: Tensor, truth: Tensor) -> float:
    """rms(found - truth) / rms(truth), in float64; infinite if ``found`` is not finite or has another shape."""
    if found.shape != truth.shape:
        return math.inf
    wide = torch.complex128 if truth.is_complex() else torch.float64
    found, truth = found.detach().cpu().to(wide), truth.detach().cpu().to(wide)
    error = float((found - truth).abs().square().mean().sqrt() / truth.abs().square().mean().sqrt())
    return error if math.isfinite(error) else math.inf


def _results(case: Case, backend: str, device: torch.device, *, wide: bool, seed: int) -> dict[str, Tensor]:
    """Outputs and gradients by name. The inputs are the same float32 numbers, whatever is computed with them."""
    inputs = {name: _cast(x, wide).to(device) for name, x in case.inputs.items()}
    inputs = {name: x.requires_grad_(case.differentiable) for name, x in inputs.items()}
    fixed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.fixed.items()}
    outputs = case.run(**inputs, **fixed, backend=backend)
    named_outputs = {f"output {i}": y for i, y in enumerate(outputs)}
    if not case.differentiable:
        return named_outputs
    generator = torch.Generator().manual_seed(seed + 1)
    total = torch.zeros((), device=device, dtype=outputs[0].dtype)
    for y in outputs:
        weight = torch.randn(y.shape, generator=generator)
        total = total + (y * weight.to(device, y.dtype)).sum().to(total.dtype)
    gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True, materialize_grads=True)
    named = dict(zip(inputs, gradients))
    return named_outputs | {f"gradient of {n}": g for n, g in named.items()}


def _cast(x: Tensor, wide: bool) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128 if wide else torch.complex64)
    return x.to(torch.float64 if wide else torch.float32)
