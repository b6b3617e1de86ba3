"""What the op tests share: relative errors, random packings, and running an op with all its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """What an op gave: its outputs in order and the gradient of every differentiable input by name."""

    outputs: list[Tensor]
    grads: dict[str, Tensor]


def rms_error(got: Tensor, want: Tensor) -> float:
    """rms(got - want) / rms(want) in float64; plain rms(got - want) where `want` is all zeros."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    kind = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.detach().to(kind), want.detach().to(kind)
    scale = want.abs().square().mean().sqrt().item()
    error = (got - want).abs().square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str = "") -> None:
    """Relative RMS error within `tolerance`; NaN fails."""
    error = rms_error(got, want)
    assert error <= tolerance, f"{name}: relative RMS error {error:.3g} > {tolerance:g}"


def assert_same_run(got: Run, want: Run, tolerance: float, grad_tolerance: float | None = None) -> None:
    """Outputs and gradients of two runs agree."""
    assert len(got.outputs) == len(want.outputs)
    for i, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        assert_close(a, b, tolerance, f"output {i}")
    assert got.grads.keys() == want.grads.keys()
    for name in want.grads:
        assert_close(got.grads[name], want.grads[name], grad_tolerance or tolerance, f"gradient of {name}")


def run(fn: Callable[..., Any], tensors: Mapping[str, Tensor | None], seed: int = 0, **options: Any) -> Run:
    """Call fn(**tensors, **options), then backpropagate one fixed random weighting of all its outputs.

    Floating inputs become fresh leaves; nested tuples of outputs are flattened. The weighting depends on the seed
    and the outputs' shapes only, so runs of two twins (also of different dtypes) see the same loss.
    """
    leaves = {
        name: t if t is None or not t.is_floating_point() else t.detach().clone().requires_grad_()
        for name, t in tensors.items()
    }
    outputs = _flatten(fn(**leaves, **options))
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        loss = loss + (y.double() * weight).sum()
    wanted = {k: t for k, t in leaves.items() if t is not None and t.requires_grad}
    if not wanted or not loss.requires_grad:
        return Run([y.detach() for y in outputs], {})
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return Run([y.detach() for y in outputs], dict(zip(wanted, grads, strict=True)))


def to_double(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same inputs with every floating tensor in float64."""
    return {k: t.double() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}


def cumulative(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens (S+1,) of the given document lengths."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=dtype)


def random_lengths(n: int, documents: int, seed: int) -> list[int]:
    """`documents` lengths that sum to n; from three documents on one is empty and one holds a single token."""
    generator = torch.Generator().manual_seed(seed)
    if documents < 3 or n < 2:
        cuts = sorted(torch.randint(0, n + 1, (documents - 1,), generator=generator).tolist())
        return [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    rest = random_lengths(n - 1, documents - 2, seed + 1)
    lengths = [*rest, 0, 1]
    return [lengths[i] for i in torch.randperm(documents, generator=generator).tolist()]


def padded_cumulative(lengths: Sequence[int]) -> tuple[Tensor, int]:
    """cu_seqlens padded with empty documents to a power-of-two count, and max_len rounded up to a power of two."""
    count = 1 << max(len(lengths) - 1, 0).bit_length()
    longest = max(lengths, default=0)
    return cumulative([*lengths, *[0] * (count - len(lengths))]), 1 << max(longest - 1, 0).bit_length()


def separate_documents(
    fn: Callable[..., Any],
    per_token: Mapping[str, Tensor],
    per_sequence: Mapping[str, Tensor | None],
    lengths: Sequence[int],
    **options: Any,
) -> list[Tensor]:
    """Run every document of a packed row on its own and put the results together as a packed run gives them.

    per_token tensors are (1, n, ...), per_sequence (S, ...). fn returns y first, then states; y is joined along
    time, states along the sequence. Differentiable.
    """
    results, begin = [], 0
    for i, length in enumerate(lengths):
        tokens = {k: t[:, begin : begin + length] for k, t in per_token.items()}
        states = {k: None if t is None else t[i : i + 1] for k, t in per_sequence.items()}
        results.append(_flatten(fn(**tokens, **states, **options)))
        begin += length
    columns = list(zip(*results, strict=True))
    return [torch.cat(columns[0], 1), *(torch.cat(c, 0) for c in columns[1:])]


def _flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _flatten(item)]
