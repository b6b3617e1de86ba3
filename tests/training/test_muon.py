"""Muon and its variants against their formulas in float64, one matrix at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.optimizer import MuonConfig
from plait.config.table import kinds
from plait.models.model import Model
from plait.nn.roles import matrix_parts
from plait.training import muon
from plait.training.muon import Muon, orthogonalised

ALL = {
    "method": "polar_express",
    "precision": "fp32",
    "scale": "shape",
    "equal_rows": True,
    "renormalise": True,
    "beta2": 0.9,
    "cautious": True,
}


def polar(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, by the singular value decomposition."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16), (1, 7), (7, 1)])
@pytest.mark.parametrize(("method", "near"), [("newton_schulz", 0.4), ("polar_express", 0.2)])
def test_singular_values_come_near_one_and_vectors_stay(
    shape: tuple[int, int], method: str, near: float
) -> None:
    matrix = torch.randn(shape) * 1e-3
    for precision in ("fp32", "bf16"):
        found = orthogonalised(matrix, MuonConfig.model_validate({"method": method, "precision": precision}))
        values = torch.linalg.svdvals(found.double())
        assert (values - 1).abs().max() < near
        # the same singular vectors: what is left of the polar factor is symmetric
        rest = (polar(matrix).mT if shape[0] >= shape[1] else polar(matrix)) @ (
            found.double() if shape[0] >= shape[1] else found.double().mT
        )
        assert (rest - rest.mT).abs().max() < (1e-4 if precision == "fp32" else 0.05)


def test_a_stack_is_its_matrices() -> None:
    config = MuonConfig.model_validate(ALL)
    matrices = [torch.randn(6, 20) for _ in range(3)]
    stack = orthogonalised(torch.stack(matrices), config)
    for one, of_stack in zip(matrices, stack, strict=True):
        torch.testing.assert_close(of_stack, orthogonalised(one, config), rtol=1e-4, atol=1e-5)


def test_rows_are_made_equal_before_and_the_norm_set_after() -> None:
    scales = torch.tensor([1e-3, 1.0, 30.0, 0.2])[:, None]
    rows = torch.nn.functional.normalize(torch.randn(4, 9), dim=1)
    equal = MuonConfig(equal_rows=True, precision="fp32")
    plain = MuonConfig(precision="fp32")
    torch.testing.assert_close(
        orthogonalised(rows * scales, equal), orthogonalised(rows, plain), atol=1e-5, rtol=1e-4
    )
    renormalised = orthogonalised(rows * scales, MuonConfig(renormalise=True))
    assert float(renormalised.norm()) == pytest.approx(math.sqrt(4), rel=1e-5)
    assert float(orthogonalised(rows * scales, MuonConfig()).float().norm()) != pytest.approx(2.0, rel=1e-2)


def reference_step(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, momentum: float, decay: float
) -> Tensor:
    """All variants together, written down once more, in float64 and by the exact polar factor's norm."""
    state["buffer"] = momentum * state["buffer"] + (1 - momentum) * gradient
    x = (1 - momentum) * gradient + momentum * state["buffer"]
    n, m = x.shape
    x = x / x.norm(dim=1, keepdim=True) * x.norm() / math.sqrt(n)
    x = x / (1.01 * x.norm())
    for a, b, c in muon.POLAR_EXPRESS:
        gram = x.mT @ x
        x = a * x + b * x @ gram + c * x @ gram @ gram
    x = x * math.sqrt(min(n, m)) / x.norm()
    along = 1 if n >= m else 0
    squares = x.square().mean(dim=along, keepdim=True)
    state["second"] = 0.9 * state["second"] + 0.1 * squares
    evened = x / state["second"].sqrt()
    x = evened * x.norm() / evened.norm()
    rate = lr * math.sqrt(max(1.0, n / m))
    return weight - rate * x - rate * decay * weight * ((x * weight) >= 0)


@pytest.mark.parametrize("shape", [(5, 11), (11, 5), (6, 6)])
def test_every_variant_together_is_its_formula(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = Muon(
        [{"params": [parameter], "lr": 0.03, "weight_decay": 0.5}], MuonConfig.model_validate(ALL)
    )
    weight = parameter.detach().double()
    columns = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    state = {"buffer": torch.zeros(shape).double(), "second": torch.zeros(columns).double()}
    for _ in range(4):
        gradient = torch.randn(shape)
        parameter.grad = gradient.clone()
        weight = reference_step(weight, gradient.double(), state, 0.03, 0.95, 0.5)
        optimizer.step()
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [{}, ALL])
def test_parts_are_as_if_they_were_apart(variant: dict[str, Any]) -> None:
    """Queries are square, keys and values wide: each has its scale, its second moment, its own orthogonalisation."""
    config = MuonConfig.model_validate({**variant, "precision": "fp32"})
    sizes, columns = (8, 4, 4, 20), 8
    joined = nn.Parameter(torch.randn(sum(sizes), columns))
    apart = [nn.Parameter(part.clone()) for part in joined.detach().split(sizes)]
    group = {"lr": 0.02, "weight_decay": 0.1}
    together = Muon([{"params": [joined], **group}], config, {joined: sizes})
    alone = Muon([{"params": apart, **group}], config)
    whole = nn.Parameter(joined.detach().clone())
    as_one = Muon([{"params": [whole], **group}], config)
    for _ in range(3):
        gradient = torch.randn_like(joined)
        joined.grad, whole.grad = gradient.clone(), gradient.clone()
        for parameter, part in zip(apart, gradient.split(sizes), strict=True):
            parameter.grad = part.clone()
        for optimizer in (together, alone, as_one):
            optimizer.step()
    assert torch.equal(joined, torch.cat(list(apart)))
    assert (joined - whole).abs().max() > 2e-3, "as one matrix it is another step"


def test_matrices_of_one_shape_are_worked_on_together_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stacked path, on a CPU: the same numbers, and never more than the limit at once."""
    config = MuonConfig.model_validate(ALL)
    first = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6, 4), (4, 6), (4, 6))]
    second = [nn.Parameter(p.detach().clone()) for p in first]
    one, many = (Muon([{"params": p, "lr": 0.02, "weight_decay": 0.1}], config) for p in (first, second))
    for a, b in zip(first, second, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    one.step()
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    monkeypatch.setattr(muon, "_STACKED", 2 * 24)
    seen: list[int] = []
    real = muon.orthogonalised

    def counted(matrix: Tensor, config: MuonConfig) -> Tensor:
        seen.append(matrix.shape[0] if matrix.dim() == 3 else 1)
        return real(matrix, config)

    monkeypatch.setattr(muon, "orthogonalised", counted)
    many.step()
    assert sorted(seen) == [1, 1, 2]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", kinds())
def test_the_parts_of_every_kind_are_whole(kind: str) -> None:
    model = Model(
        load_config({"model": {"d_model": 32, "pattern": kind, "vocab_size": 30}}).model, device="meta"
    )
    parts = matrix_parts(model)
    assert parts, "the MLP's gate and value are joined in any case"
    for name, sizes in parts.items():
        assert sum(sizes) == model.get_parameter(name).shape[0] and min(sizes) > 0 and len(sizes) > 1
    mixer = {name.split(".mixer.")[1]: sizes for name, sizes in parts.items() if ".mixer." in name}
    known = {
        "attention": {"in_proj.weight": (32, 32, 32)},
        "lstm": {"rnn.weight_ih_l0": (32,) * 4, "rnn.weight_hh_l0": (32,) * 4},
        "gru": {"rnn.weight_ih_l0": (32,) * 3, "rnn.weight_hh_l0": (32,) * 3},
        "rnn": {},
        "mamba": {"in_proj.weight": (64, 64), "x_proj.weight": (2, 16, 16)},
    }
    if kind in known:
        assert mixer == known[kind]


def test_what_has_no_coefficients_is_refused() -> None:
    with pytest.raises(ConfigError, match="polar_express has 5 steps at most; got 6"):
        MuonConfig(method="polar_express", steps=6)
