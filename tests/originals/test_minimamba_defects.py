"""Defects of MiniMamba that must not come back here, one test for each, numbered as in the survey of its defects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from plait.config.errors import DataError
from plait.config.schema import ModelConfig
from plait.formats.minimamba import from_state_dict
from plait.mixers import mamba as mamba_file
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba, Options
from plait.models.model import Model
from plait.ops.selective_scan import selective_scan
from tests.invariants import make_mixer, redraw, rms, sequences

FIXTURES = Path(__file__).parents[1] / "fixtures" / "minimamba"
CONFIG = json.loads((FIXTURES / "oracle.json").read_text())["cases"]["lm"]["config"]
BACKENDS = pytest.mark.parametrize("backend", ["portable", "reference"])


def scan_inputs(length: int, decay: float = 0.9) -> dict[str, Tensor]:
    """x, dt (1, T, 3), A (3, 4) so that exp(dt A) is about ``decay``, B and C, in float64."""
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rate = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4) * torch.tensor(decay).log().double()
    return {
        "x": normal(1, length, 3),
        "dt": torch.rand(1, length, 3, generator=g, dtype=torch.float64) + 0.5,
        "A": rate,
        "B": normal(1, length, 4),
        "C": normal(1, length, 4),
    }


def one_by_one(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None) -> Tensor:
    """The recurrence, a token at a time."""
    h = torch.zeros_like(A) if h is None else h
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[0, t, :, None] * A) * h + (dt * x)[0, t, :, None] * B[0, t]
        outputs.append((h * C[0, t]).sum(-1))
    return torch.stack(outputs)[None]


@BACKENDS
@pytest.mark.parametrize("length", [1, 8, 9, 16, 100, 128, 129, 300])
def test_c1_the_scan_equals_the_recurrence_at_every_length(length: int, backend: str) -> None:
    """There the parallel scan had the sign of the decay inverted and added the carry of a block twice."""
    inputs = scan_inputs(length)
    y, _ = selective_scan(**inputs, backend=backend)
    assert rms(y, one_by_one(**inputs)) < 1e-12
    y, _ = selective_scan(**{k: t.float() for k, t in inputs.items()}, backend=backend)
    assert rms(y, one_by_one(**inputs)) < 1e-5


def test_c1_the_scan_is_what_trains_and_keeps_no_square_of_the_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There the parallel scan was dead code, and would have kept (L, L, E, N) numbers."""
    calls: list[int] = []

    def counted(x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(x.shape[1])
        return selective_scan(x, *rest, backend="portable", **options)

    monkeypatch.setattr(mamba_file, "selective_scan", counted)
    mixer = Mamba(Options(d_state=4), 8)
    kept: dict[int, int] = {}
    for length in (256, 1024):
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mixer(torch.randn(1, length, 8), Layout.dense(1, length))[0].sum().backward()
        kept[length] = total
    assert calls == [256, 1024]
    assert kept[1024] < 4.5 * kept[256]  # linear: 4 times as much


@BACKENDS
def test_c2_strong_decays_neither_overflow_nor_are_clamped(backend: str) -> None:
    """There a product of decays was divided by: infinite after 12 steps of 1e-3; decays below 1e-20 were altered."""
    inputs = scan_inputs(200, decay=1e-3)
    y, last = selective_scan(**{k: t.float() for k, t in inputs.items()}, backend=backend)
    assert y.isfinite().all() and last.isfinite().all()
    assert rms(y, one_by_one(**inputs)) < 1e-5
    # a decay of e^-60 = 9e-27 is what it is: a state of 1e26 leaves 0.88 behind
    inputs = scan_inputs(1)
    inputs["A"] = torch.full((3, 4), -60.0, dtype=torch.float64) / inputs["dt"][0, 0, :, None]
    h = torch.full((3, 4), 1e26, dtype=torch.float64)
    y, last = selective_scan(**inputs, initial_state=h[None], backend=backend)
    assert rms(y, one_by_one(**inputs, h=h)) < 1e-12
    assert 0.1 < (last - selective_scan(**inputs, backend=backend)[1]).abs().min() < 1


def test_c2_gradients_of_strong_decays() -> None:
    inputs = {k: t[:, :40] if t.shape[0] == 1 else t for k, t in scan_inputs(40, decay=1e-3).items()}
    leaves = [t.requires_grad_() for t in inputs.values()]
    ours = torch.autograd.grad(selective_scan(**inputs, backend="portable")[0].square().sum(), leaves)
    true = torch.autograd.grad(one_by_one(**inputs).square().sum(), leaves)
    for a, b in zip(ours, true, strict=True):
        assert rms(a, b) < 1e-10


@pytest.fixture(scope="module")
def converted() -> Model:
    return from_state_dict(load_file(FIXTURES / "lm_state_dict.safetensors"), CONFIG)


def test_c3_cached_equals_uncached_at_every_split(converted: Model) -> None:
    """There generation with a cache crashed; behind that, states of the prompt were never kept."""
    ids = torch.randint(51, (2, 14), generator=torch.Generator().manual_seed(0))
    for model in (converted, redrawn()):
        whole = model(ids).logits[..., : model.vocab_size]
        for cut in range(15):
            for second in {cut, min(cut + 4, 14)}:  # a prompt after a prompt is read whole
                cache = model.new_cache(2, 14)
                spans = ((0, cut), (cut, second), (second, 14))
                logits = torch.cat([model.step(ids[:, a:b], cache) for a, b in spans], 1)
                assert rms(logits, whole) < 1e-5, (cut, second)


def test_c3_generation_with_and_without_a_cache(converted: Model) -> None:
    options = {"max_new_tokens": 20, "temperature": 0.0}
    prompts = [[1, 2, 3, 4, 5], [7], [9, 9]]
    assert converted.generate(prompts, **options) == converted.generate(prompts, use_cache=False, **options)


def redrawn(**options: object) -> Model:
    config = {
        "d_model": 24,
        "pattern": "M*2",
        "vocab_size": 51,
        "mlp": "none",
        "mamba": {"d_state": 6, **options},
    }
    model = Model(ModelConfig.model_validate(config))
    redraw(model)
    return model.eval()


def test_c4_the_bias_of_the_time_steps_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it was added twice: initial time steps from 1e-6 to 1e-3 instead of 1e-3 to 0.1."""
    seen: list[Tensor] = []

    def watched(x: Tensor, dt: Tensor, *rest: Any, dt_bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(F.softplus(dt + dt_bias))
        return selective_scan(x, dt, *rest, dt_bias=dt_bias, **options)

    monkeypatch.setattr(mamba_file, "selective_scan", watched)
    torch.manual_seed(0)
    mixer = Mamba(Options(), 64)
    mixer(torch.zeros(1, 3, 64), Layout.dense(1, 3))  # without input there is the bias alone
    (dt,) = seen
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1001


def test_c5_the_gate_has_its_activation() -> None:
    """There y was multiplied by z itself; an import says so, a new model does not do it."""
    mixer = make_mixer("mamba", {"bias": True})
    (x,) = sequences(mixer, [9])
    outputs = []
    for z in (1.0, -1.0):
        with torch.no_grad():
            mixer.in_proj.weight[32:] = 0
            mixer.in_proj.bias[32:] = z
            mixer.out_proj.bias.zero_()
        outputs.append(mixer(x, Layout.dense(1, 9))[0])
    ratio = F.silu(torch.tensor(-1.0).double()) / F.silu(torch.tensor(1.0).double())  # -0.37, not -1
    torch.testing.assert_close(outputs[1], outputs[0] * ratio)


def test_c6_the_rank_of_the_time_steps_is_rounded_up() -> None:
    """There it was rounded down: 2 for a width of 40; an import keeps its 2."""
    assert [Mamba(Options(), width).dt_rank for width in (8, 16, 40, 48)] == [1, 1, 3, 3]
    given = {**CONFIG, "dt_rank": "auto"}
    model = from_state_dict(load_file(FIXTURES / "lm_state_dict.safetensors"), given)
    assert model.blocks[0].mixer.dt_rank == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_c7_ids_that_pad_the_vocabulary_are_never_sampled(use_cache: bool) -> None:
    torch.manual_seed(0)
    for padded in (True, False):
        config = {
            "d_model": 8,
            "pattern": "M",
            "vocab_size": 5,
            "pad_vocab_size_multiple": 64,
            "head": {"tie": False, "bias": True, "padded": padded},
        }
        model = Model(ModelConfig.model_validate(config))
        with torch.no_grad():
            model.head.unembedding.bias[5:] = 50.0
        assert model(torch.tensor([[1]])).logits.shape[-1] == (64 if padded else 5)
        rows = model.generate(
            [[1]], num_samples=8, max_new_tokens=10, temperature=2.0, use_cache=use_cache, seed=1
        )
        assert all(token < 5 for row in rows for token in row)


def classifier(num_labels: int = 3, pooling: str = "mean") -> Model:
    head = {"kind": "classification", "num_labels": num_labels, "pooling": pooling}
    config = {"d_model": 16, "pattern": "M", "vocab_size": 30, "head": head}
    model = Model(ModelConfig.model_validate(config))
    redraw(model)
    return model.eval()


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "max"])
def test_c9_a_row_of_pads_alone_is_pooled_to_finite_numbers(pooling: str) -> None:
    """There it was divided by its length of zero; and the size of the vocabulary was no field of the config."""
    model = classifier(pooling=pooling)
    ids = torch.randint(30, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1] = 0
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
    out.loss.backward()
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    alone = torch.cat([model(ids[i : i + 1]).logits for i in (0, 2)])
    torch.testing.assert_close(out.logits[[0, 2]], alone)


def test_c9_labels_have_exactly_one_shape() -> None:
    """There labels.squeeze() let one label stand for all rows, and (B, 1) against (B,) for a (B, B) table."""
    ids, wanted = torch.randint(30, (4, 5)), torch.tensor([1.0, -1.0, 2.0, 0.5])
    model = classifier(num_labels=1)
    out = model(ids, labels=wanted)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - wanted).square().mean())
    torch.testing.assert_close(model(ids, labels=wanted[:, None]).loss, out.loss)
    for labels in (wanted[:1], wanted[None], wanted[0], torch.ones(4, 2)):
        for width in (1, 3):
            with pytest.raises(DataError, match=r"labels have shape .* must be \(4,\)"):
                classifier(num_labels=width)(ids, labels=labels)


def test_c10_a_batch_of_one_keeps_its_dimension(converted: Model) -> None:
    ids = torch.randint(51, (3, 7))
    cases = [(converted, (1, 7, 56)), (classifier(), (1, 3)), (classifier(num_labels=1), (1, 1))]
    for model, shape in cases:
        rows = ids % 30
        one, all_rows = model(rows[:1]).logits, model(rows).logits
        assert one.shape == shape
        torch.testing.assert_close(one[0], all_rows[0], atol=1e-5, rtol=1e-5)
    regression = classifier(num_labels=1)
    out = regression(ids[:1] % 30, labels=torch.tensor([0.5]))
    assert out.loss.shape == () and out.loss.isfinite()
    cache = converted.new_cache(1, 7)
    assert converted.step(ids[:1, :1], cache).shape == (1, 1, 51)
    for block, state in zip(converted.blocks, cache.states, strict=True):
        assert (
            block.kind == "mamba" and state["conv"].shape == (1, 3, 80) and state["ssm"].shape == (1, 80, 6)
        )


def test_c13_a_cache_is_the_callers_and_two_do_not_mix(converted: Model) -> None:
    """There layers found their states by an index that was set from outside."""
    ids = torch.randint(51, (2, 12), generator=torch.Generator().manual_seed(3))
    before = {name: id(value) for m in converted.modules() for name, value in vars(m).items()}
    caches = [converted.new_cache(1, 12) for _ in ids]
    steps: list[list[Tensor]] = [[], []]
    for t in range(12):
        for row, cache in enumerate(caches):
            steps[row].append(converted.step(ids[row : row + 1, t : t + 1], cache))
    together = converted(ids).logits[..., :51]
    for row in range(2):
        torch.testing.assert_close(torch.cat(steps[row], 1)[0], together[row], atol=1e-5, rtol=1e-5)
    assert before == {name: id(value) for m in converted.modules() for name, value in vars(m).items()}
    # the same layers in another order keep nothing of their old place
    converted.blocks[0], converted.blocks[1] = converted.blocks[1], converted.blocks[0]
    cache = converted.new_cache(2, 12)
    logits = torch.cat([converted.step(ids[:, :5], cache), converted.step(ids[:, 5:], cache)], 1)
    torch.testing.assert_close(logits, converted(ids).logits[..., :51], atol=1e-5, rtol=1e-5)
    converted.blocks[0], converted.blocks[1] = converted.blocks[1], converted.blocks[0]
