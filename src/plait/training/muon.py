"""Muon: the momentum of a matrix, orthogonalised, is its update (Jordan 2024, kellerjordan.github.io/posts/muon).

    B <- m B + (1 - m) G;   U = orthogonalised((1 - m) G + m B);   W <- (1 - lr d) W - lr s U

G gradient, B momentum buffer, m momentum, d decay, s the scale by shape. U has G's singular vectors and singular
values near one. The variants of ``MuonConfig`` change single steps of this:

    equal_rows     before: the rows of the matrix at one norm (arXiv 2603.28254)
    polar_express  a better polynomial at each step of the iteration (arXiv 2505.16932)
    renormalise    after: the norm that an orthogonal matrix has (arXiv 2602.21545)
    beta2          after: rows (of wide matrices: columns) divided by the root of their mean square's average,
                   the norm of the whole kept (NorMuon, arXiv 2510.05491)
    cautious       decay only where update and weight have one sign (arXiv 2510.12402)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.config.optimizer import MuonConfig
from plait.training.distributed import whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Optimal polynomials for singular values down to 1e-3, one a step, with a margin for bfloat16 (their table).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_MARGIN, _TINY = 1.01, 1e-6
# On a GPU matrices of one shape are orthogonalised together, up to so many values: few launches, bounded memory.
_STACKED = 1 << 26


@dataclass(frozen=True)
class _Piece:
    """Rows ``start`` .. ``stop`` - 1 of a parameter: a matrix of its own."""

    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.parameter.shape[1]

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.start : self.stop]


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions; groups have ``lr``, ``momentum`` and ``weight_decay``.

    A step uses the gradients up: they hold the update's momentum afterwards.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        config: MuonConfig,
        parts: Mapping[nn.Parameter, Sequence[int]] | None = None,
    ) -> None:
        """parts: the rows of the matrices that are joined in a parameter; each is orthogonalised alone."""
        defaults = {"lr": 1e-3, "momentum": config.momentum, "weight_decay": 0.0}
        super().__init__([dict(group) for group in groups], defaults)
        self.config = config
        self._pieces: dict[nn.Parameter, list[_Piece]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                sizes = (parts or {}).get(parameter, (parameter.shape[0],))
                ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
                self._pieces[parameter] = [
                    _Piece(parameter, end - size, end) for size, end in zip(sizes, ends, strict=True)
                ]

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state before its first step: zeros."""
        state = {"momentum_buffer": torch.zeros_like(parameter.detach())}
        if self.config.beta2 is not None:
            # One value a row or column of each piece, one piece after another; the same on every process.
            size = sum(max(piece.shape) for piece in self._pieces[parameter])
            state["second_moment"] = torch.zeros(size, dtype=torch.float32, device=parameter.device)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            used: list[nn.Parameter] = [p for p in group["params"] if p.grad is not None]
            for parameter in used:
                if not self.state[parameter]:
                    self.state[parameter].update(self.new_state(parameter))
                buffer = self.state[parameter]["momentum_buffer"]
                gradient = _gradient(parameter)
                buffer.lerp_(gradient, 1 - group["momentum"])
                gradient.lerp_(buffer, group["momentum"])
            for pieces in _stacks([p for p in used if not _sharded(p)], self._pieces):
                weights = [piece.parameter for piece in pieces]
                self._update(pieces, weights, [_gradient(weight) for weight in weights], group)
            for parameter in filter(_sharded, used):
                self._update_sharded(parameter, group)
        return loss

    def _update_sharded(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Every process computes the whole update, which needs the whole matrix, and keeps its share of it."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        weight, gradient = whole(parameter.detach()), whole(_gradient(parameter))
        for piece in self._pieces[parameter]:
            self._update([piece], [weight], [gradient], group)
        share = distribute_tensor(weight, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(share)

    def _update(
        self,
        pieces: Sequence[_Piece],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        group: dict[str, Any],
    ) -> None:
        """Pieces of one shape, each with the whole weight and gradient of its parameter."""
        rows, columns = pieces[0].shape
        taken = [piece.of(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
        updates = orthogonalised(taken[0] if len(taken) == 1 else torch.stack(taken), self.config)
        by_adamw = self.config.scale == "adamw"
        scale = 0.2 * math.sqrt(max(rows, columns)) if by_adamw else math.sqrt(max(1.0, rows / columns))
        lr, decay = group["lr"], group["weight_decay"]
        for piece, weight, update in zip(
            pieces, weights, [updates] if len(taken) == 1 else updates.unbind(), strict=True
        ):
            matrix = piece.of(weight.detach())
            if self.config.beta2 is not None:
                update = evened(update.to(matrix.dtype), self._second_moment(piece), self.config.beta2)
            if not self.config.cautious:
                matrix.mul_(1 - lr * decay)
            elif decay:
                update = update + decay * matrix * (update * matrix >= 0)
            matrix.add_(update, alpha=-lr * scale)

    def _second_moment(self, piece: _Piece) -> Tensor:
        """This piece's slice of the state, as a column (rows, 1) or for wide matrices a row (1, columns)."""
        before = [other for other in self._pieces[piece.parameter] if other.start < piece.start]
        start = sum(max(other.shape) for other in before)
        rows, columns = piece.shape
        values = self.state[piece.parameter]["second_moment"][start : start + max(rows, columns)]
        return values[:, None] if rows >= columns else values[None, :]


def orthogonalised(matrix: Tensor, config: MuonConfig) -> Tensor:
    """A matrix (n, m), or a stack (K, n, m), with its singular values brought near one."""
    x = matrix.bfloat16() if config.precision == "bf16" else matrix.float()
    if config.equal_rows:
        norms = x.float().norm(dim=-1, keepdim=True).clamp_min(_TINY)
        mean = x.float().norm(dim=(-2, -1), keepdim=True) / math.sqrt(x.shape[-2])
        x = x * (mean / norms).to(x.dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = x.norm(dim=(-2, -1), keepdim=True)
    if config.method == "polar_express":
        x = x / (norm * _MARGIN + _TINY)
        coefficients: Sequence[tuple[float, float, float]] = POLAR_EXPRESS[: config.steps]
    else:
        x = x / norm.clamp_min(1e-7)
        coefficients = (NEWTON_SCHULZ,) * config.steps
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in coefficients:  # x <- a x + (b A + c A^2) x with A = x x^T
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if tall:
        x = x.mT
    if config.renormalise:
        x = x.to(matrix.dtype)
        norm = x.float().norm(dim=(-2, -1), keepdim=True).clamp_min(_TINY)
        x = x * (math.sqrt(min(x.shape[-2:])) / norm).to(x.dtype)
    return x


def evened(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """An update (n, m) with each row, or for wide ones each column, over its root mean square; the norm stays.

    second_moment: the average of the mean squares, (n, 1) or (1, m), moved on here.
    """
    along = -1 if second_moment.shape[-1] == 1 else -2
    squares = update.float().square().mean(dim=along, keepdim=True)
    second_moment.lerp_(squares, 1 - beta2)
    factors = second_moment.clamp_min(1e-10).rsqrt()
    before = squares.sum().sqrt()
    after = (squares * factors.square()).sum().sqrt()
    return update * (factors * (before / after.clamp_min(1e-10))).to(update.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sharded(parameter: nn.Parameter) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _stacks(
    parameters: Sequence[nn.Parameter], pieces: Mapping[nn.Parameter, Sequence[_Piece]]
) -> Iterator[list[_Piece]]:
    """Pieces of one shape that are worked on together: one at a time, on a GPU many."""
    by_shape: dict[tuple[int, int], list[_Piece]] = {}
    for parameter in parameters:
        for piece in pieces[parameter]:
            by_shape.setdefault(piece.shape, []).append(piece)
    for (rows, columns), alike in by_shape.items():
        together = max(1, _STACKED // (rows * columns)) if alike[0].parameter.is_cuda else 1
        for at in range(0, len(alike), together):
            yield alike[at : at + together]
