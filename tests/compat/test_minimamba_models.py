"""MiniMamba's models over Plait's: their numbers, parts by themselves, mixers of one's own, its trained weights."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import plait
from plait.compat.minimamba import (
    S6,
    BaseMambaConfig,
    InferenceParams,
    MambaBlock,
    MambaClassificationConfig,
    MambaClassificationHead,
    MambaEmbedding,
    MambaEncoder,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    MambaLegacy,
    MambaLMConfig,
    MambaLMHead,
    RMSNorm,
)
from plait.config.errors import BuildError, CheckpointError, DataError
from plait.config.table import TABLE
from plait.formats.native import save_model
from plait.mixers import mamba as mamba_file
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba
from plait.ops.dispatch import choose_name
from plait.ops.selective_scan import SELECTIVE_SCAN, selective_scan
from tests.invariants import redraw, rms

FIXTURES = Path(__file__).parents[1] / "fixtures" / "minimamba"
CASES: dict[str, Any] = json.loads((FIXTURES / "oracle.json").read_text())["cases"]
LOGITS, FEATURES, LOSS = 5e-5, 2e-5, 1e-5  # the tolerances of the fixture's README
SMALL: dict[str, Any] = {"d_model": 24, "n_layer": 3, "d_state": 6}
V = 51
language_models = pytest.mark.parametrize("case", ["lm", "lm_untied_bias"])


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


def language_model(mixer_cls: type[nn.Module] | None = None, **more: Any) -> MambaForCausalLM:
    model = MambaForCausalLM(MambaLMConfig(**{**SMALL, "vocab_size": V, **more}), mixer_cls=mixer_cls)
    redraw(model)
    return model.eval()


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(0))


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


# ---- MiniMamba's trained weights


@language_models
def test_a_trained_language_model(case: str, caplog: pytest.LogCaptureFixture) -> None:
    config = MambaLMConfig.from_dict(CASES[case]["config"])
    model = MambaForCausalLM(config)
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(load_file(FIXTURES / f"{case}_state_dict.safetensors"))
    assert "gate without SiLU" in caplog.text
    true = load_file(FIXTURES / f"{case}.safetensors")
    out = model(true["input_ids"], labels=true["labels"])
    assert (out["logits"] - true["logits"]).abs().max() <= LOGITS
    assert (out["loss"] - true["loss"]).abs() <= LOSS
    assert (model(true["input_ids_long"]) - true["logits_long"]).abs().max() <= LOGITS
    params = InferenceParams(max_batch_size=2)
    ids = true["input_ids"]
    parts = [model(ids[:, a:b], params) for a, b in ((0, 7), (7, 8), (8, ids.shape[1]))]
    assert (torch.cat(parts, 1) - true["logits"]).abs().max() <= LOGITS
    assert model.generate(ids, max_new_tokens=20, temperature=3.0).max() < V  # never the padded ids
    # it is saved under Plait's names and goes on as what it is
    again = MambaForCausalLM.from_original(load_file(FIXTURES / f"{case}_state_dict.safetensors"), config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids), model(ids)) and not again.training


def test_trained_weights_keep_device_dtype_and_checkpointing() -> None:
    given = {**CASES["lm"]["config"], "dtype": "bfloat16"}
    model = MambaForCausalLM(MambaLMConfig.from_dict(given))
    model.gradient_checkpointing_enable()
    model.load_state_dict(load_file(FIXTURES / "lm_state_dict.safetensors"))
    kept = {n for n, p in model.model.named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.mixer.A_log" in kept and "blocks.0.mixer.in_proj.weight" not in kept
    assert model.training
    counts = [saved_values(m) for m in (model, MambaForCausalLM(MambaLMConfig.from_dict(given)))]
    assert counts[0] < 0.5 * counts[1]


def test_a_trained_classifier_and_features(tmp_path: Path) -> None:
    true = load_file(FIXTURES / "classification.safetensors")
    tensors = load_file(FIXTURES / "classification_state_dict.safetensors")
    for pooling in ("last", "mean", "max"):
        config = MambaClassificationConfig.from_dict(
            {**CASES["classification"]["config"], "pooling_strategy": pooling}
        )
        model = MambaForSequenceClassification.from_original(tensors, config)
        assert (model(true["input_ids"]) - true[f"logits_{pooling}"]).abs().max() <= LOGITS
        masked = model(true["input_ids"], attention_mask=true["attention_mask"])
        assert (masked - true[f"logits_{pooling}_masked"]).abs().max() <= LOGITS
    true = load_file(FIXTURES / "features.safetensors")
    save_file(load_file(FIXTURES / "features_state_dict.safetensors"), tmp_path / "model.safetensors")
    MambaLMConfig.from_dict(CASES["features"]["config"]).save_to_json(tmp_path / "config.json")

    class Features(MambaForFeatureExtraction):
        config_class = MambaLMConfig

    for path in (tmp_path, tmp_path / "model.safetensors"):  # the configuration lies beside the weights
        features = Features.from_original(path)
        assert (features(true["input_ids"]) - true["features_from_ids"]).abs().max() <= FEATURES
        found = features(true["input_embeddings"])
        assert (found - true["features_from_embeddings"]).abs().max() <= FEATURES


def test_weights_that_do_not_fit_are_refused() -> None:
    lm = load_file(FIXTURES / "lm_state_dict.safetensors")
    config = MambaLMConfig.from_dict(CASES["lm"]["config"])
    with pytest.raises(CheckpointError, match="a model for lm, which MambaForFeatureExtraction is not"):
        MambaForFeatureExtraction(config).load_state_dict(lm)
    with pytest.raises(CheckpointError, match=r"mixer\.D is missing"):
        MambaForCausalLM(config).load_state_dict({n: t for n, t in lm.items() if not n.endswith("0.mixer.D")})
    with pytest.raises(CheckpointError, match="without a mixer_cls"):
        MambaForCausalLM(config, mixer_cls=Shift).load_state_dict(lm)
    with pytest.raises(CheckpointError, match="its configuration are needed"):
        MambaForCausalLM.from_original(lm)


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


# ---- parts


def test_a_model_is_made_of_its_parts() -> None:
    model, ids = language_model(), ids_of(2, 7)
    hidden = model.backbone(model.embedding(ids))
    assert rms(model.lm_head(hidden)[..., :V], model(ids)) < 1e-6
    x = model.embedding(ids)
    for layer in model.backbone.layers:
        y = layer(x)
        assert isinstance(layer.mixer, S6) and rms(x + layer.mixer(layer.norm(x)), y) < 1e-6
        x = y
    assert rms(model.backbone.norm(x), hidden) < 1e-6
    seen: list[int] = []
    model.backbone.layers[1].mixer.register_forward_hook(lambda *_: seen.append(1))
    model(ids)
    assert seen == [1]  # the layer's own mixer, not a copy
    model.backbone.layers[0].mixer.A_log.data.add_(1)
    assert rms(model(ids), model.lm_head(hidden)[..., :V]) > 1e-2


def test_parts_by_themselves() -> None:
    config, x = BaseMambaConfig(**SMALL, dt_rank=4, bias=True), torch.randn(2, 9, 24)
    s6 = S6(config)
    assert (s6.d_inner, s6.dt_rank, s6.config) == (48, 4, config) and isinstance(s6, Mamba)
    assert torch.equal(s6(x), Mamba.forward(s6, x, Layout.dense(2, 9))[0])
    block = MambaBlock(config)
    torch.testing.assert_close(block(x), x + block.mixer(block.norm(x)))
    for layer in (s6, block):
        with pytest.raises(BuildError, match="a layer by itself keeps no state"):
            layer(x, InferenceParams())
    norm = RMSNorm(24, eps=0.1)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())
    encoder = MambaEncoder(config)
    assert [type(layer).__name__ for layer in encoder.layers] == ["MambaBlock"] * 3
    params = InferenceParams(max_batch_size=2)
    parts = [encoder(x[:, :5], params), encoder(x[:, 5:], params)]
    assert rms(torch.cat(parts, 1), encoder(x)) < 1e-5
    assert encoder.get_cache_info(params)["seqlen_offset"] == 9
    encoder.reset_cache(params)
    assert encoder.get_cache_info(params)["cached_layers"] == 0
    with pytest.raises(DataError, match="MambaEncoder takes vectors"):
        encoder(ids_of(2, 3))
    assert isinstance(MambaBlock(BaseMambaConfig(**SMALL, rms_norm=False)).norm, nn.LayerNorm)


def test_heads_by_themselves() -> None:
    embedding = MambaEmbedding(V, 24, pad_token_id=3)
    assert (embedding.vocab_size, embedding.d_model, embedding.pad_token_id) == (V, 24, 3)
    assert embedding(torch.tensor([[3]])).abs().sum() == 0
    assert 0.015 < embedding.token_embedding.weight.std() < 0.025
    h = torch.randn(3, 5, 24)
    tied = MambaLMHead(24, V, bias=True, embedding_layer=embedding.token_embedding)
    assert tied.tie_weights and torch.equal(tied(h), h @ embedding.token_embedding.weight.T)
    untied = MambaLMHead(24, V, tie_weights=False, embedding_layer=embedding.token_embedding)
    assert not untied.tie_weights and not torch.equal(untied(h), tied(h))
    head = MambaClassificationHead(24, 4, pooling_strategy="mean", dropout=0.0)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    want = torch.stack([h[0, :2].mean(0), h[1, 1:].mean(0), h[2].mean(0)]) @ head.classifier.weight.T
    torch.testing.assert_close(head(h, mask), want)
    assert 0.01 < head.classifier.weight.std() < 0.03 and head.classifier.bias.abs().sum() == 0


# ---- mixers of one's own


class Shift(nn.Module):
    """A map of the token before; MiniMamba gives mixers ``inference_params``, which may be left out."""

    def __init__(self, config: BaseMambaConfig) -> None:
        super().__init__()
        self.map = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, inference_params: object) -> Tensor:
        assert inference_params is None
        return self.map(F.pad(x, (0, 0, 1, 0))[:, :-1])


class Slow(S6):
    """S6 with other initial rates: its forward is S6's, so it keeps its states."""

    def __init__(self, config: BaseMambaConfig) -> None:
        super().__init__(config)
        with torch.no_grad():
            self.A_log.sub_(2.0)


class Doubled(S6):
    """S6 with another forward."""

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        return 2 * super().forward(x, inference_params)


@pytest.mark.parametrize("mixer_cls", [Shift, Slow, Doubled, S6, None])
def test_a_pluggable_mixer_trains_and_generates(mixer_cls: type[nn.Module] | None) -> None:
    model, ids = language_model(mixer_cls), ids_of(2, 8)
    kept = mixer_cls in (Slow, S6, None)
    assert model.model.stateful == kept
    layers = model.backbone.layers
    assert all(type(layer.mixer) is (mixer_cls or S6) for layer in layers)
    if mixer_cls in (Shift, Slow, Doubled):
        assert [layer.mixer.layer_idx for layer in layers] == [0, 1, 2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it recomputes is said once a process
        found = model.generate(ids, max_new_tokens=6, do_sample=False)
    want = ids
    for _ in range(6):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, want)
    params = InferenceParams(max_batch_size=2)
    if kept:
        parts = [model(ids[:, :3], params), model(ids[:, 3:], params)]
        assert rms(torch.cat(parts, 1), model(ids)) < 1e-5
    else:
        with pytest.raises(BuildError, match=r"layer 0 \(minimamba_.*\) is not stateful"):
            model(ids, params)


def test_a_mixer_takes_part_as_it_says() -> None:
    config, x = BaseMambaConfig(**SMALL), torch.randn(2, 5, 24)
    torch.manual_seed(0)
    block = MambaBlock(config, mixer_cls=Doubled)
    y = Mamba.forward(block.mixer, block.norm(x), Layout.dense(2, 5))[0]
    torch.testing.assert_close(block(x), x + 2 * y)
    slow = MambaForCausalLM(MambaLMConfig(**SMALL, vocab_size=V), mixer_cls=Slow)
    rates = slow.backbone.layers[2].mixer.A_log.exp() * torch.e**2
    torch.testing.assert_close(rates, torch.arange(1.0, 7.0).expand(48, 6))
    encoder = MambaEncoder(config, mixer_cls=Shift)
    assert isinstance(encoder.layers[0].mixer, Shift)


def test_what_cannot_be_a_mixer_is_refused() -> None:
    config = MambaLMConfig(**SMALL, vocab_size=V)
    with pytest.raises(BuildError, match=r"must be a subclass of torch.nn.Module"):
        MambaForCausalLM(config, mixer_cls=lambda config: nn.Identity())  # type: ignore[arg-type]
    model = MambaForCausalLM(config)
    for name in ("backbone", "lm_head", "embedding"):
        with pytest.raises(BuildError, match=rf"{name} cannot be replaced: .*mixer_cls="):
            setattr(model, name, nn.Identity())


# ---- fields that take effect


def saved_values(model: MambaForCausalLM) -> int:
    """Numbers that a forward keeps for backward."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(ids_of(2, 64), labels=ids_of(2, 64))
    return total


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
