"""Norms before matrix products write what autocast would make of them: the same numbers, in one pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.config.schema import ModelConfig
from plait.mixers.contract import Layout
from plait.models.block import Block
from plait.nn import norm as norms
from tests.invariants import redraw

WIDTH = 32


def block(**options: object) -> Block:
    config = ModelConfig.model_validate(
        {"d_model": WIDTH, "pattern": "T", "attention": {"n_head": 2}, "mlp": "swiglu", **options}
    )
    made = Block(config.layers()[0], WIDTH, causal=True, index=0)
    redraw(made)
    return made


def run(made: Block, narrow: bool) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        y, _ = made(x, Layout.dense(2, 9))
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, WIDTH)).sum(), [x, *made.parameters()])
    return y.detach(), list(grads)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"norm": {"kind": "rms", "weight": False}}, {"residual": "none"}], ids=str
)
def test_one_pass_gives_the_numbers_of_two(
    options: dict[str, object], narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = block(**options)
    fused, gradients = run(made, narrow)

    def in_steps(x: Tensor, y: Tensor, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
        return norm(x + y), x + y

    monkeypatch.setattr("plait.models.block.add_and_norm", in_steps)
    monkeypatch.setattr("plait.models.block.norm_for_products", lambda norm, x: norm(x))
    apart, expected = run(made, narrow)
    assert fused.dtype == apart.dtype
    torch.testing.assert_close(fused, apart, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == b.dtype
        error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        assert error < (2**-7 if narrow else 1e-6)  # gradients that meet before the norm do so in bfloat16


def test_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm that a product reads is bfloat16 under autocast, float32 otherwise; the stream stays float32."""
    seen = []
    made = block()
    made.mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))  # type: ignore[union-attr]
    made.mixer.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    assert run(made, True)[0].dtype == torch.float32
    assert run(made, False)[0].dtype == torch.float32
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    calls = []
    right = norms.add_norm
    monkeypatch.setattr(norms, "add_norm", lambda *a, **k: calls.append(1) or right(*a, **k))
    run(made, False)
    assert calls == [1]
