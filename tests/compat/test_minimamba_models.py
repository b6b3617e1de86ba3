"""MiniMamba's models over Plait's: losses, pads, classifiers, features, and fields that take effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import plait
from plait.compat.minimamba import (
    BaseMambaConfig,
    InferenceParams,
    MambaBlock,
    MambaClassificationConfig,
    MambaEncoder,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    MambaLegacy,
    MambaLMConfig,
)
from plait.config.errors import DataError
from plait.formats.native import save_model
from plait.mixers import mamba as mamba_file
from plait.ops.dispatch import choose_name
from plait.ops.selective_scan import SELECTIVE_SCAN, selective_scan
from tests.compat.minimamba_models import (
    CASES,
    FIXTURES,
    LOGITS,
    SMALL,
    V,
    ids_of,
    language_model,
    saved_values,
)
from tests.invariants import redraw, rms

pytestmark = pytest.mark.usefixtures("own_table")


# ---- the language model


def test_new_models_are_mamba_as_its_paper_means_it() -> None:
    model = MambaForCausalLM(MambaLMConfig(d_model=40, n_layer=2, vocab_size=V)).model
    layer = model.config.layers()[0]
    options = layer.options.model_dump()
    assert (options["gate"], options["dt_bias_scale"], options["dt_rank"]) == ("silu", 1.0, "auto")
    assert [block.mixer.dt_rank for block in model.blocks] == [3, 3]  # 40 / 16, rounded up
    assert model.embedding.tokens.weight.shape == (56, 40)
    assert model(ids_of(2, 5)).logits.shape == (2, 5, V)
    assert (layer.block.norm.kind, layer.block.norm.eps, layer.block.mlp.kind) == ("rms", 1e-5, "none")


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_the_next_token(tied: bool) -> None:
    model, ids = language_model(tie_embeddings=tied, bias=True), ids_of(3, 8)
    labels = ids.clone()
    labels[0, 3:5] = labels[2, 0] = -100
    out = model(ids, labels=labels)
    assert sorted(out) == ["logits", "loss"]
    logits = model(ids)
    assert torch.equal(out["logits"], logits)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out["loss"], want)
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    unembedding = model.lm_head.lm_head
    assert (unembedding.weight is model.embedding.token_embedding.weight) == tied
    assert unembedding.bias is not None


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_on_either_side_change_nothing(side: str) -> None:
    model, ids = language_model(), ids_of(2, 9)
    mask = torch.ones(2, 9)
    pads = slice(0, 4) if side == "left" else slice(5, 9)
    mask[1, pads] = 0
    real = mask[1].bool()
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, labels=labels, attention_mask=mask)
    alone = [model(ids[:1], labels=ids[:1]), model(ids[1:, real], labels=ids[1:, real])]
    assert rms(out["logits"][1, real], alone[1]["logits"][0]) < 1e-5
    want = (8 * alone[0]["loss"] + 4 * alone[1]["loss"]) / 12
    torch.testing.assert_close(out["loss"], want)
    left = {"left": 4, "right": 0}[side]
    unmasked = model(ids)[1, left:][: real.sum()]
    moved = rms(unmasked, alone[1]["logits"][0])
    assert moved > 1e-2 if side == "left" else moved < 1e-5  # the mask is what did it


def test_empty_and_single_tokens() -> None:
    model = language_model()
    assert model(ids_of(2, 0)).shape == (2, 0, V)
    assert rms(model(ids_of(2, 4)[:, :1]), model(ids_of(2, 4))[:, :1]) < 1e-6
    params = InferenceParams(max_batch_size=2)
    assert model(ids_of(2, 0), params).shape == (2, 0, V) and params.seqlen_offset == 0
    assert rms(model(ids_of(2, 4), params), model(ids_of(2, 4))) < 1e-6
    encoder = MambaEncoder(BaseMambaConfig(**SMALL))
    assert encoder(torch.empty(2, 0, 24)).shape == (2, 0, 24)


def test_the_older_class(tmp_path: Path) -> None:
    config = MambaLMConfig(**SMALL, vocab_size=V, bias=True, tie_embeddings=False, rms_norm=False)
    model = MambaLegacy(config)
    assert model.lm_head.tie_weights and model.lm_head.lm_head.bias is None
    assert type(model.backbone.norm).__name__ == "RMSNorm"
    assert isinstance(model.backbone.layers[0].norm, nn.LayerNorm)
    assert model(ids_of(2, 6)).shape == (2, 6, V)
    names = {
        "embedding.token_embedding.weight": "embedding.weight",
        "backbone.norm.weight": "norm_f.weight",
        "lm_head.lm_head.weight": "lm_head.weight",
    }
    theirs = load_file(FIXTURES / "lm_state_dict.safetensors")
    old = {names.get(n, n.removeprefix("backbone.")): t for n, t in theirs.items()}
    model = MambaLegacy(MambaLMConfig.from_dict(CASES["lm"]["config"]))
    model.load_state_dict(old)
    true = load_file(FIXTURES / "lm.safetensors")
    assert (model(true["input_ids"]) - true["logits"]).abs().max() <= LOGITS


# ---- classifier and features


def test_classification_loss_and_pooling() -> None:
    ids = ids_of(4, 7)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    config = MambaClassificationConfig(**SMALL, vocab_size=V, num_labels=3, dropout=0.5)
    for pooling in ("last", "mean", "max"):
        config.pooling_strategy = pooling
        model = MambaForSequenceClassification(config).eval()
        redraw(model)
        hidden = [
            model.backbone(model.embedding(ids[i : i + 1, : int(m.sum())]))[0] for i, m in enumerate(mask)
        ]
        pick = {"last": lambda h: h[-1], "mean": lambda h: h.mean(0), "max": lambda h: h.amax(0)}[pooling]
        want = F.linear(
            torch.stack([pick(h) for h in hidden]),
            model.classifier.classifier.weight,
            model.classifier.classifier.bias,
        )
        assert rms(model(ids, attention_mask=mask.float()), want) < 1e-5
        out = model(ids, attention_mask=mask, labels=torch.tensor([0, 2, 1, 1]))
        torch.testing.assert_close(out["loss"], F.cross_entropy(out["logits"], torch.tensor([0, 2, 1, 1])))
        assert not torch.equal(model.train()(ids), model.eval()(ids))  # the dropout
    config.num_labels, labels = 1, torch.tensor([0.5, -1.0, 2.0, 0.0])
    regression = MambaForSequenceClassification(config).eval()
    out = regression(ids, mask, labels)
    torch.testing.assert_close(out["loss"], F.mse_loss(out["logits"][:, 0], labels))


def test_features_of_ids_and_of_vectors() -> None:
    model = MambaForFeatureExtraction(MambaLMConfig(**SMALL, vocab_size=V)).eval()
    redraw(model)
    ids = ids_of(2, 6)
    assert torch.equal(model(ids), model(model.embedding(ids)))
    bare = MambaForFeatureExtraction(BaseMambaConfig(**SMALL)).eval()
    assert model.has_embeddings and not bare.has_embeddings
    vectors = torch.randn(2, 6, 24)
    assert bare(vectors).shape == (2, 6, 24)
    params = InferenceParams(max_batch_size=2)
    parts = [bare(vectors[:, :4], params), bare(vectors[:, 4:], params)]
    assert rms(torch.cat(parts, 1), bare(vectors)) < 1e-5
    with pytest.raises(DataError, match="the config has no vocab_size: give vectors"):
        bare(ids)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    assert rms(model(ids, attention_mask=mask)[1, :2], model(ids)[1, :2]) < 1e-5


# ---- fields that take effect


@pytest.mark.parametrize("fast", [True, False])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(fast: bool) -> None:
    plain = language_model(use_fast_path=fast)
    by_field = language_model(use_fast_path=fast, gradient_checkpointing=True)
    by_call = language_model(use_fast_path=fast)
    by_call.gradient_checkpointing_enable()
    by_call.gradient_checkpointing_enable()
    ids = ids_of(2, 20)
    for model in (by_field, by_call):
        model.load_state_dict(plain.state_dict())
        assert saved_values(model) < 0.5 * saved_values(plain)
        model(ids, labels=ids)["loss"].backward()
    plain(ids, labels=ids)["loss"].backward()
    for a, b, c in zip(*(m.parameters() for m in (plain, by_field, by_call)), strict=True):
        assert rms(b.grad, a.grad) < 1e-5 and rms(c.grad, a.grad) < 1e-5


@pytest.mark.parametrize("fast", [True, False])
def test_use_fast_path_says_which_backend_runs(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def watched(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        seen.add(choose_name(SELECTIVE_SCAN, None, "cpu", torch.float32))
        return selective_scan(*args, **options)

    monkeypatch.setattr(mamba_file, "selective_scan", watched)
    outside = choose_name(SELECTIVE_SCAN, None, "cpu", torch.float32)
    assert outside == "cpu"
    model, ids = language_model(use_fast_path=fast, gradient_checkpointing=True), ids_of(1, 5)
    model(ids, labels=ids)["loss"].backward()
    model.generate(ids, max_new_tokens=2)
    for _ in model.generate_streaming(ids, max_new_tokens=3):
        assert choose_name(SELECTIVE_SCAN, None, "cpu", torch.float32) == outside  # the caller's own
    MambaBlock(model.config)(torch.randn(1, 3, 24))
    assert seen == {"cpu" if fast else "portable"}


def test_device_and_dtype() -> None:
    assert language_model_on("meta").model.device.type == "meta"
    config = MambaLMConfig(**SMALL, vocab_size=V, dtype=torch.bfloat16)
    model = MambaForCausalLM(config)
    kinds = {n: p.dtype for n, p in model.model.named_parameters() if n.startswith("blocks.0.mixer")}
    assert kinds["blocks.0.mixer.in_proj.weight"] == torch.bfloat16
    assert kinds["blocks.0.mixer.A_log"] == kinds["blocks.0.mixer.dt_proj.bias"] == torch.float32
    assert model(ids_of(1, 4)).dtype == torch.bfloat16
    block = MambaBlock(BaseMambaConfig(**SMALL, dtype="float64", device="cpu"))
    assert block(torch.randn(1, 4, 24, dtype=torch.float64)).dtype == torch.float64


def language_model_on(device: str) -> MambaForCausalLM:
    return MambaForCausalLM(MambaLMConfig(**SMALL, vocab_size=V, device=device))


# ---- trained by hand, saved, resumed


def test_end_to_end_with_ones_own_loop(tmp_path: Path) -> None:
    def start() -> tuple[MambaForCausalLM, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaLMConfig(**SMALL, vocab_size=V))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model: MambaForCausalLM, optimizer: torch.optim.Optimizer, steps: range) -> float:
        for step in steps:
            ids = torch.randint(V, (4, 1), generator=torch.Generator().manual_seed(step))
            ids = (ids + torch.arange(12)) % V  # counting
            loss = model(ids, labels=ids)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    model, optimizer = start()
    train(model, optimizer, range(40))
    torch.save({"model": model.state_dict(), "opt": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    assert train(model, optimizer, range(40, 80)) < 1.0
    again, optimizer = start()
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["opt"])
    train(again, optimizer, range(40, 80))
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    found = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=5, do_sample=False)
    assert found.tolist() == [[7, 8, 9, 10, 11, 12, 13, 14]]
    save_model(model.model, tmp_path / "model")
    loaded = plait.load(tmp_path / "model")
    assert loaded.generate([[7, 8, 9]], max_new_tokens=5, temperature=0.0) == [[10, 11, 12, 13, 14]]
