"""MiniMamba's parts by themselves, and mixers of one's own in its models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.compat.minimamba import (
    S6,
    BaseMambaConfig,
    InferenceParams,
    MambaBlock,
    MambaClassificationHead,
    MambaEmbedding,
    MambaEncoder,
    MambaForCausalLM,
    MambaLMConfig,
    MambaLMHead,
    RMSNorm,
)
from plait.config.errors import BuildError, DataError
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba
from tests.compat.minimamba_models import (
    SMALL,
    Shift,
    V,
    ids_of,
    language_model,
)
from tests.invariants import rms

pytestmark = pytest.mark.usefixtures("own_table")


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
