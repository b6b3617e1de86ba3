"""The loss in chunks of tokens: the plain loss and its gradients, without all logits in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plait.config.errors import BuildError
from plait.config.schema import ModelConfig
from plait.models import Model, linear_loss
from plait.models.linear_loss import linear_cross_entropy
from plait.models.loss import cross_entropy
from plait.training.memory import Census
from tests.invariants import rms

N, D, V = 37, 12, 29


def draw(dtype: torch.dtype = torch.float64, tokens: int = N) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(tokens, D), (V, D), (V,)]
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    targets = torch.randint(V, (tokens,), generator=g)
    targets[::5] = -100
    return tensors, targets


def plain(x: Tensor, w: Tensor, b: Tensor | None, targets: Tensor, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(x, w, b)
    return cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), targets)[0]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, N, 100])
def test_loss_and_gradients_are_those_of_all_logits(chunk: int, bias: bool, softcap: float | None) -> None:
    (x, w, b), targets = draw()
    leaves = [x, w, b] if bias else [x, w]
    expected = plain(x, w, b if bias else None, targets, softcap)
    loss, count = linear_cross_entropy(x, w, b if bias else None, targets, softcap=softcap, chunk=chunk)
    assert int(count) == int((targets != -100).sum())
    assert abs(float(loss.detach() / expected.detach()) - 1) < 1e-12
    got = torch.autograd.grad(loss * 0.7, leaves)
    for ours, true in zip(got, torch.autograd.grad(expected * 0.7, leaves), strict=True):
        assert rms(ours, true) < 1e-12


def test_no_tokens_and_no_targets_are_a_loss_of_zero() -> None:
    for tokens in (0, 5):
        (x, w, b), targets = draw(tokens=tokens)
        loss, count = linear_cross_entropy(x, w, b, torch.full_like(targets, -100), chunk=2)
        assert (float(loss.detach()), int(count)) == (0.0, 0)
        assert all(not g.any() for g in torch.autograd.grad(loss, [x, w, b]))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_narrows_the_products_alone(kind: torch.dtype) -> None:
    (x, w, b), targets = draw(torch.float32, 200)
    with torch.autocast("cpu", kind):
        expected = plain(x, w, b, targets, None)
        loss, _ = linear_cross_entropy(x, w, b, targets, chunk=64)
    assert abs(float(loss.detach() / expected.detach()) - 1) < 1e-5  # the same rounded logits
    got = torch.autograd.grad(loss, [x, w, b])
    assert [g.dtype for g in got] == [torch.float32] * 3
    for ours, true in zip(got, torch.autograd.grad(plain(x, w, b, targets, None), [x, w, b]), strict=True):
        assert rms(ours, true) < 1e-2


def test_a_second_backward_gives_the_same_and_leaves_the_first_alone() -> None:
    """The gradients are scaled in place: those of the first backward belong to who asked for them."""
    (x, w, b), targets = draw()
    loss, _ = linear_cross_entropy(x, w, b, targets, chunk=8)
    first = torch.autograd.grad(loss * 0.7, [x, w, b], retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(loss * 0.35, [x, w, b])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(rms(2 * a, b) < 1e-12 for a, b in zip(second, kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_a_tied_embedding_adds_to_the_heads_gradient_in_place(small_budget: int) -> None:
    """What the loss has made is the gradient at last, without a copy of its size."""
    built, ids = model(), torch.randint(1000, (8, 64))
    out = built(ids, labels=ids)
    made: Any = out.loss_sum.grad_fn
    place = made.made[1].data_ptr()
    out.loss.backward()
    grad = built.embedding.tokens.weight.grad
    assert grad is not None and grad.data_ptr() == place


def test_a_frozen_weight_gets_no_gradient_and_evaluation_computes_none() -> None:
    (x, w, b), targets = draw()
    loss, _ = linear_cross_entropy(x, w.detach(), b.detach(), targets, chunk=8)
    assert torch.autograd.grad(loss, x)[0].shape == x.shape
    calls = Products()
    with torch.no_grad(), calls:
        linear_cross_entropy(x, w, b, targets, chunk=N)
    assert calls.count == 1  # the logits alone


class Products(TorchDispatchMode):
    """Counts matrix products, and the elements of the largest tensor."""

    count = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *made])
        return result


def model(head: dict[str, object] | None = None, **values: object) -> Model:
    torch.manual_seed(0)
    given = {"d_model": 16, "pattern": "T", "vocab_size": 1000, "head": head or {}, **values}
    return Model(ModelConfig.model_validate(given), dtype=torch.float64)


HEADS: dict[str, dict[str, Any]] = {
    "tied": {},
    "own, capped": {"head": {"tie": False, "softcap": 5.0}},
    "padded rows that count": {"head": {"padded": True}, "pad_vocab_size_multiple": 64},
    "padded rows cut off": {"head": {"bias": True}, "pad_vocab_size_multiple": 64},
    "BERT's": {
        "head": {"kind": "masked_lm", "transform": "gelu", "bias": True},
        "causal": False,
    },
}


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> int:
    """64 tokens of the vocabulary of 1000 at a time."""
    monkeypatch.setattr(linear_loss, "_BYTES_CPU", 4 * 64 * 1000)
    return 64


@pytest.mark.parametrize("name", HEADS)
def test_a_model_splits_its_loss_and_gives_logits_to_who_asks(name: str, small_budget: int) -> None:
    built = model(**HEADS[name])
    ids = torch.randint(1000, (3, 70))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    loss = []
    for at_once in (False, True):
        out = built(ids, attention_mask=mask, labels=ids, logits=at_once)
        gradients = torch.autograd.grad(out.loss, list(built.parameters()), retain_graph=True)
        loss.append((out, gradients))
    (split, ours), (whole, true) = loss
    assert "logits" in split and split.keys() == whole.keys()
    assert callable(split._logits) and isinstance(whole._logits, Tensor)
    assert abs(float((split.loss / whole.loss).detach()) - 1) < 1e-12
    assert abs(float(whole.loss.detach()) - math.log(1000)) < 0.5
    for a, b in zip(ours, true, strict=True):
        assert (not b.any() and not a.any()) or rms(a, b) < 1e-12
    assert torch.equal(split.logits, whole.logits) and split["logits"] is split.logits
    again = torch.autograd.grad(split.logits.sum(), built.embedding.tokens.weight)[0]
    assert torch.equal(again, torch.autograd.grad(whole.logits.sum(), built.embedding.tokens.weight)[0])


def test_logits_that_nobody_asked_for_in_time_are_refused(small_budget: int) -> None:
    built = model()
    ids = torch.randint(1000, (2, 70))
    out = built(ids, labels=ids)
    out.loss.backward()
    assert out.logits is not None  # before the update, also after backward
    late = built(ids, labels=ids)
    with torch.no_grad():
        built.embedding.tokens.weight += 1
    with pytest.raises(BuildError, match="logits=True"):
        _ = late.logits


def test_logits_are_of_the_precision_and_grad_mode_of_the_call(small_budget: int) -> None:
    built = model().float()
    ids = torch.randint(1000, (2, 70))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        split, whole = built(ids, labels=ids), built(ids, labels=ids, logits=True)
    assert split.logits.dtype == torch.bfloat16 and not split.logits.requires_grad
    assert torch.equal(split.logits, whole.logits)


def test_no_tensor_has_all_tokens_and_the_vocabulary(small_budget: int) -> None:
    built, ids = model(), torch.randint(1000, (8, 64))
    peaks, largest = [], []
    for at_once in (True, False):
        built.zero_grad()
        with Census() as census, Products() as seen:
            built(ids, labels=ids, logits=at_once).loss.backward()
        peaks.append(census.peak)
        largest.append(seen.largest)
    assert largest[0] == 512 * 1000
    assert largest[1] < 70 * 1000  # of attention, and a chunk of 64 tokens
    assert peaks[1] < 0.4 * peaks[0]


def test_few_tokens_take_the_plain_way() -> None:
    built, ids = model(), torch.randint(1000, (2, 70))
    assert isinstance(built(ids, labels=ids)._logits, Tensor)
